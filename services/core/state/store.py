"""What a state store is: one bucket of keys with revisions. The fake and JetStream KV both keep to it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from services.core.errors import InvalidName

LONGEST_KEY = 1500
"""Characters: a key becomes a subject of NATS, whose lines have 4,096 bytes."""
_KEY = re.compile(r"[-_=.a-zA-Z0-9]+(/[-_=.a-zA-Z0-9]+)*")


@dataclass(frozen=True, slots=True)
class Entry:
    """One key at one revision."""

    key: str
    value: bytes | None
    """None once the key was deleted."""
    revision: int
    """Grows with every write to the bucket, so a key's own revisions grow, too."""
    traceparent: str = ""
    """W3C trace context of what wrote it, in entries of a watch; empty when nothing did that was traced."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a bucket keeps at most. The server itself sees to it."""

    age: timedelta
    """Since a key's last write; then it is gone."""
    size: int
    """Bytes of all keys; once they are reached writes fail with StateUnavailable."""


class StateStore(Protocol):
    """One bucket. Keys are resource names (``projects/p/runs/r``); values are at most 1 MiB.

    A prefix covers the key of that name and all keys below it, whole segments only: ``projects/p`` covers
    ``projects/p`` and ``projects/p/runs/r`` but not ``projects/p2``. A trailing slash leaves out the key itself; the
    empty prefix covers the bucket.

    Every method raises StateUnavailable when the server does not answer; a write may have happened nevertheless.
    """

    async def get(self, key: str) -> Entry | None:
        """The newest entry, or None when there is none or it was deleted. Sees every acknowledged write."""
        ...

    async def create(self, key: str, value: bytes) -> int:
        """Writes a key that must not be there; returns the revision.

        Raises:
            ResourceExists: it is there.
        """
        ...

    async def update(self, key: str, value: bytes, revision: int) -> int:
        """Writes a key that must be at ``revision``; returns the new revision.

        Raises:
            RevisionMismatch: it is at another one, or not there.
        """
        ...

    async def delete(self, key: str, revision: int | None = None) -> None:
        """Deletes a key. Without a revision a missing key is fine.

        Raises:
            RevisionMismatch: the key is not at ``revision``.
        """
        ...

    async def list(self, prefix: str = "") -> list[Entry]:
        """All entries under the prefix, sorted by key."""
        ...

    async def keys(self, prefix: str = "") -> Sequence[str]:
        """The keys under the prefix, sorted. What they hold is not read, and a bucket that is not there is not made."""
        ...

    def watch(self, prefix: str = "") -> AsyncIterator[Entry]:
        """The entries under the prefix, then every change, in order of revision and without end.

        Deletions come as entries without a value, those from before the watch, too. Of several quick changes to one
        key only the last may come. Survives outages and restarts of the server.
        """
        ...


def check_key(key: str) -> str:
    """The key, when it is a valid one.

    Raises:
        InvalidName: it has an empty segment or a character that JetStream KV does not allow, or is too long.
    """
    if len(key) > LONGEST_KEY or not _KEY.fullmatch(key):
        raise InvalidName(
            f"{key[:200]!r} is not a valid key", field="name", hint="Use letters, digits and - _ = . between slashes."
        )
    return key


def covers(prefix: str, key: str) -> bool:
    """Whether the key lies under the prefix."""
    if not prefix:
        return True
    return key == prefix or key.startswith(prefix if prefix.endswith("/") else prefix + "/")
