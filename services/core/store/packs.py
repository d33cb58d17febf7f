"""Packs: the contents of many small files in one blob, because an object store takes its time for every object.

A pack is the plain concatenation of its files, so that a range request gives one of them to any S3 client. Who lists
files notes for each its place: the pack and the offset.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from services.core.errors import DigestMismatch
from services.core.store.blobs import Blobs

PACK_BYTES = 8 << 20
"""About how large a pack is; a larger file has one for itself."""
KEPT_PACKS = 3
"""Packs that a reader keeps at hand: who reads in the order of the listing meets the same one again and again."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file's bytes are."""

    pack: str
    """SHA-256 of the pack, which is a blob."""
    offset: int
    """Of the first byte in the pack."""


@dataclass(frozen=True, slots=True)
class Pack:
    """Contents, put together."""

    data: bytes
    places: Sequence[Place]
    """Of each content, in the order they were given."""

    @classmethod
    def of(cls, contents: Sequence[bytes]) -> Pack:
        """Puts contents together. Blocks for hashing; for a thread."""
        data = b"".join(contents)
        sha256 = hashlib.sha256(data).hexdigest()
        offsets = itertools.accumulate(map(len, contents), initial=0)
        return cls(data, [Place(sha256, offset) for offset, _ in zip(offsets, contents, strict=False)])


class Packs:
    """Reads files out of packs. One for each job: it keeps the last few packs in memory."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._kept: OrderedDict[str, asyncio.Task[bytes]] = OrderedDict()

    async def get(self, place: Place, size: int, sha256: str) -> bytes:
        """The bytes of one file, verified.

        Raises:
            ObjectNotFound: the pack is gone.
            DigestMismatch: the pack is damaged, or the file is not at that place.
        """
        data = await self.get_unverified(place, size)
        verify(data, place, sha256)
        return data

    async def get_unverified(self, place: Place, size: int) -> bytes:
        """The bytes of one file, for :func:`verify`; fewer when the pack ends before.

        Raises:
            ObjectNotFound, DigestMismatch: the pack is gone, or damaged.
        """
        return (await self._pack(place.pack))[place.offset : place.offset + size]

    async def _pack(self, sha256: str) -> bytes:
        """The whole pack; of several who want it at once one fetches it, for all."""
        task = self._kept.get(sha256)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._kept[sha256] = asyncio.ensure_future(self._blobs.get(sha256))
            while len(self._kept) > KEPT_PACKS:
                self._kept.popitem(last=False)  # who waits for it has the task
        self._kept.move_to_end(sha256)
        # Shielded: a caller that goes away must not take the pack from the others.
        return await asyncio.shield(task)


def verify(data: bytes, place: Place, sha256: str) -> None:
    """Checks the bytes of one file. Blocks for hashing: those of many files are for a thread.

    Raises:
        DigestMismatch: they are others.
    """
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DigestMismatch(
            f"the pack {place.pack} does not have {sha256} at {place.offset}",
            field="sha256",
            hint="Sync the source again, and take a new snapshot.",
        )
