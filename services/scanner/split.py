"""The split into train and test, which leaks nothing.

Where a source marks test files, they are the test set and the rest is train. Else, or when a share is asked for, a hash
of the content decides: it is seeded, it does not depend on names or order, and files that are added later move hardly
any other. A language or folder of some size is never without a test file. A group of duplicates is never divided.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.scanner.verdict import Split

DEFAULT_SHARE = 0.05
MIN_TEST_GROUPS = 20
"""Fewer make a test loss that jumps."""
STRATUM_GROUPS = 20
"""From so many files on a language's folder has a test file, whatever the hashes."""
MAX_SHARE = 1 / 3
"""However few files there are, most are for training."""


@dataclass(frozen=True, slots=True)
class Item:
    """One accepted file."""

    group: str
    """Equal for files that must not be divided."""
    asked: Split
    """What its source says: TRAIN, TEST or AUTO."""
    stratum: str = ""
    """See :func:`stratum`."""


def stratum(language: str, source: str, path: str) -> str:
    """Of which kind a file is: the test set has its share of every kind. By language, source and top folder."""
    folder, slash, _ = path.partition("/")
    return f"{language}\0{source}\0{folder if slash else ''}"


def assign(items: Sequence[Item], *, seed: int = 0, share: float | None = None) -> list[Split]:
    """TRAIN or TEST for every item.

    A group with a TEST member is test as a whole.

    Args:
        seed: another seed gives another automatic test set.
        share: of the AUTO groups that become test; None means :data:`DEFAULT_SHARE` unless files are marked TEST.
    """
    asked: defaultdict[str, set[Split]] = defaultdict(set)
    strata: dict[str, str] = {}
    for item in items:
        asked[item.group].add(item.asked)
        strata[item.group] = min(strata.get(item.group, item.stratum), item.stratum)
    test = {group for group, wishes in asked.items() if "TEST" in wishes}
    if share is not None or not test:
        automatic = {group: strata[group] for group, wishes in asked.items() if wishes <= {"AUTO", ""}}
        test |= _automatic(automatic, seed, DEFAULT_SHARE if share is None else share)
    return ["TEST" if item.group in test else "TRAIN" for item in items]


def _automatic(strata: Mapping[str, str], seed: int, share: float) -> set[str]:
    """The groups whose hash is below the share; the smallest one of a stratum that would have none; more when they are
    under the minimum.

    With enough groups only the hash counts, so a group's side hardly ever changes when others come.

    Args:
        strata: stratum of each group.
    """
    if share <= 0 or len(strata) < 2:
        return set()
    places = {group: _place(group, seed) for group in strata}
    ordered = sorted(strata, key=lambda group: (places[group], group))
    chosen = {group for group in ordered if places[group] < share}
    sizes = Counter(strata.values())
    served = {strata[group] for group in chosen}
    for group in ordered:
        if strata[group] not in served and sizes[strata[group]] >= STRATUM_GROUPS:
            served.add(strata[group])
            chosen.add(group)
    most = max(1, math.floor(len(strata) * MAX_SHARE))
    wanted = min(max(len(chosen), MIN_TEST_GROUPS), most)
    if len(chosen) > most:
        return set([group for group in ordered if group in chosen][:most])
    return chosen | set([group for group in ordered if group not in chosen][: wanted - len(chosen)])


def _place(group: str, seed: int) -> float:
    """A number in [0, 1) that belongs to the group."""
    digest = hashlib.sha256(f"{seed}\0{group}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
