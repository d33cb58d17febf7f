"""Held-out places: a line of a file that no training saw, to be written from what stands above it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

CONTEXT = 1200
"""Characters of the file that stand before the line."""


@dataclass(frozen=True, slots=True)
class Place:
    """One line to complete."""

    path: str
    prefix: str
    """Text up to the line's first visible character."""
    suffix: str
    expected: str
    """The rest of the line."""


def choose(files: Sequence[tuple[str, str]], count: int, seed: int = 0) -> list[Place]:
    """Lines of code worth completing: not blank, no comment, not tiny, with some file above them.

    Args:
        files: (path, text).
    """
    candidates = []
    for path, text in sorted(files):
        lines = text.splitlines(keepends=True)
        start = 0
        for number, line in enumerate(lines):
            stripped = line.strip()
            if number >= 10 and 8 <= len(stripped) <= 80 and not stripped.startswith(("#", '"""', "'''", "*")):
                indent = start + len(line) - len(line.lstrip())
                prefix = text[max(0, indent - CONTEXT) : indent]
                candidates.append(Place(path, prefix, text[start + len(line) :][:400], stripped))
            start += len(line)
    return random.Random(seed).sample(candidates, min(count, len(candidates)))


def edit_similarity(got: str, expected: str) -> float:
    """1 - Levenshtein distance / length of the longer: 1 for equal strings, 0 for nothing in common."""
    if not got and not expected:
        return 1.0
    row = list(range(len(expected) + 1))
    for i, left in enumerate(got, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(expected, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return 1 - row[-1] / max(len(got), len(expected))


@dataclass(frozen=True, slots=True)
class Score:
    """How well a version completed the places."""

    exact_match: float
    """Share of lines that are exactly right."""
    edit_similarity: float
    """Mean over the lines."""


def score(got: Sequence[str], places: Sequence[Place]) -> Score:
    """Compares the first lines that were written with those that stand there."""
    lines = [text.strip().split("\n")[0].strip() for text in got]
    pairs = [(line, place.expected) for line, place in zip(lines, places, strict=True)]
    return Score(
        exact_match=sum(line == expected for line, expected in pairs) / len(pairs),
        edit_similarity=sum(edit_similarity(line, expected) for line, expected in pairs) / len(pairs),
    )
