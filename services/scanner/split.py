"""The split into train and test, which leaks nothing.

Where a source marks test files, they are the test set and the rest is train. Else, or when a share is asked for, a hash
of the content decides: it is seeded, it does not depend on names or order, and files that are added later move hardly
any other. A group of duplicates is never divided.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from services.scanner.verdict import Split

DEFAULT_SHARE = 0.05
MIN_TEST_GROUPS = 20
"""Fewer make a test loss that jumps."""
MAX_SHARE = 1 / 3
"""However few files there are, most are for training."""


@dataclass(frozen=True, slots=True)
class Item:
    """One accepted file."""

    group: str
    """Equal for files that must not be divided."""
    asked: Split
    """What its source says: TRAIN, TEST or AUTO."""


def assign(items: Sequence[Item], *, seed: int = 0, share: float | None = None) -> list[Split]:
    """TRAIN or TEST for every item.

    A group with a TEST member is test as a whole.

    Args:
        seed: another seed gives another automatic test set.
        share: of the AUTO groups that become test; None means :data:`DEFAULT_SHARE` unless files are marked TEST.
    """
    asked: defaultdict[str, set[Split]] = defaultdict(set)
    for item in items:
        asked[item.group].add(item.asked)
    test = {group for group, wishes in asked.items() if "TEST" in wishes}
    if share is not None or not test:
        automatic = [group for group, wishes in asked.items() if wishes <= {"AUTO", ""}]
        test |= _automatic(automatic, seed, DEFAULT_SHARE if share is None else share)
    return ["TEST" if item.group in test else "TRAIN" for item in items]


def _automatic(groups: Sequence[str], seed: int, share: float) -> set[str]:
    """The groups with the smallest hashes: those below the share, and more when they are under the minimum.

    With enough groups only the hash counts, so a group's side never changes when others come.
    """
    if share <= 0 or len(groups) < 2:
        return set()
    places = {group: _place(group, seed) for group in groups}
    below = sum(place < share for place in places.values())
    most = max(1, math.floor(len(groups) * MAX_SHARE))
    count = min(max(below, MIN_TEST_GROUPS), most)
    return set(sorted(groups, key=lambda group: (places[group], group))[:count])


def _place(group: str, seed: int) -> float:
    """A number in [0, 1) that belongs to the group."""
    digest = hashlib.sha256(f"{seed}\0{group}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
