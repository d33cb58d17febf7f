"""Held-out places: lines of files that no training saw, to be written from what stands around them.

A version of a model is judged by how it completes them: the demo asks the served model, the trainer the one that it
trains. Imports no torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

CONTEXT = 1200
"""Characters of the file that stand before the line."""
SUFFIX = 400
"""Characters of the file that follow the line."""
_LINES_ABOVE = 10
_NO_CODE = ("#", "//", "/*", "*", "--", "<!--", '"""', "'''")
_CODE = re.compile(r"[()\[\]{}=;<>]|[:,]$|^(?:return|raise|yield|assert)\b")


@dataclass(frozen=True, slots=True)
class Place:
    """One line to complete."""

    path: str
    prefix: str
    """Text up to the line's first visible character."""
    suffix: str
    """What follows the line, from its newline on."""
    expected: str
    """The rest of the line, without blanks at its ends."""


def choose(files: Sequence[tuple[str, str]], count: int, seed: int = 0) -> list[Place]:
    """Lines of code worth completing: neither blank nor tiny, no comment, with some file above them.

    The choice depends on the seed and the texts alone. It goes round the files, so that a long one counts no more
    than a short one while both have lines left.

    Args:
        files: (path, text).
    """
    ranked: list[tuple[int, bytes, Place]] = []
    for path, text in files:
        digest = hashlib.blake2b(text.encode(errors="replace"), key=str(seed).encode()).digest()
        drawn = sorted(
            (hashlib.blake2b(str(number).encode(), key=digest).digest(), start) for number, start in _worth(text)
        )
        ranked += [(rank, key, _place(path, text, start)) for rank, (key, start) in enumerate(drawn[:count])]
    ranked.sort(key=lambda item: item[:2])
    return [place for _, _, place in ranked[:count]]


def _worth(text: str) -> Iterator[tuple[int, int]]:
    """(number, offset) of the lines worth completing."""
    start = 0
    for number, line in enumerate(text.split("\n")):
        code = line.strip()
        if number >= _LINES_ABOVE and 8 <= len(code) <= 80 and not code.startswith(_NO_CODE) and _CODE.search(code):
            yield number, start
        start += len(line) + 1


def _place(path: str, text: str, start: int) -> Place:
    end = text.find("\n", start)
    line = text[start:] if end < 0 else text[start:end]
    code = line.strip()
    cursor = start + line.index(code)
    end = cursor + len(code)
    return Place(path, text[max(0, cursor - CONTEXT) : cursor], text[end : end + SUFFIX], code)


def edit_similarity(got: str, expected: str) -> float:
    """1 - Levenshtein distance / length of the longer: 1 for equal strings, 0 for nothing in common."""
    return float(Levenshtein.normalized_similarity(got, expected))


def first_line(text: str) -> str:
    """The line that was written, without blanks at its ends."""
    return text.strip().split("\n")[0].strip()


def similarities(got: Sequence[str], places: Sequence[Place]) -> list[float]:
    """Edit similarity of each first line that was written to the one that stands there; 1 exactly for equal ones."""
    return [edit_similarity(first_line(text), place.expected) for text, place in zip(got, places, strict=True)]


@dataclass(frozen=True, slots=True)
class Score:
    """How well a version completed the places."""

    exact_match: float
    """Share of lines that are exactly right."""
    edit_similarity: float
    """Mean over the lines."""

    @classmethod
    def of(cls, similarities: Sequence[float]) -> Score:
        """Over at least one place."""
        count = len(similarities)
        return cls(sum(each == 1.0 for each in similarities) / count, sum(similarities) / count)
