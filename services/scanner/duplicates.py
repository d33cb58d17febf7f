"""Exact duplicates: the same bytes, or the same but for line ends and trailing blanks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file with text."""

    source: str
    path: str
    sha256: str
    fingerprint: str
    """Equal for files that differ in line ends and trailing blanks only."""
    is_test: bool
    """Whether its source marks it as test."""
    is_clean: bool
    """Whether nothing else speaks against it: only then can it be the survivor."""


def find(files: Sequence[Candidate]) -> dict[int, tuple[int, str]]:
    """Duplicates by index, each with the index of its survivor and in what they are the same.

    The survivor of a group is its first clean file by (test before train, source, path): it does not depend on the
    order of the files, and what a test file holds never stays in train.
    """
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, file in enumerate(files):
        groups[file.fingerprint].append(index)
    found: dict[int, tuple[int, str]] = {}
    for members in groups.values():
        clean = [index for index in members if files[index].is_clean]
        if len(members) < 2 or not clean:
            continue
        survivor = min(clean, key=lambda index: (not files[index].is_test, files[index].source, files[index].path))
        for index in members:
            if index != survivor:
                same = files[index].sha256 == files[survivor].sha256
                found[index] = (survivor, "same bytes" if same else "same but for line ends and blanks")
    return found
