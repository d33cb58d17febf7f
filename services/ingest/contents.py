"""Storing what a source's entries hold: each content once, many in a pack, and nothing that is stored already."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Sequence

from services.core.store import Blobs, Pack
from services.ingest.files import Entry, FoundFile, Removed, SameFile, Skipped
from services.ingest.listing import Content, ListedFile, Listing


class Contents:
    """Collects the files of one source.

    Args:
        earlier: the files of the last fetch; their contents are not stored again.
        puts: packs that are on their way to the store at once; each is held in memory.
    """

    def __init__(self, blobs: Blobs, earlier: Listing, puts: int) -> None:
        self._blobs = blobs
        self._earlier = earlier
        self._stored: dict[str, Content] = {}
        """By SHA-256, as far as they were met."""
        self._slots = asyncio.Semaphore(puts)
        self._puts: set[asyncio.Task[None]] = set()
        self.files: list[ListedFile] = []
        self.removed: list[str] = []
        """Paths that an earlier fetch had."""
        self.skipped: Counter[str] = Counter()
        self.stored_bytes = 0
        """Bytes of content that was new."""

    async def add(self, batch: Sequence[Entry]) -> None:
        """Takes entries; returns when their contents are stored or on their way.

        Raises:
            StoreUnavailable: an earlier batch could not be stored.
        """
        found: list[FoundFile] = []
        same: list[SameFile] = []
        for entry in batch:
            match entry:
                case FoundFile():
                    found.append(entry)
                case SameFile():
                    same.append(entry)
                case Removed():
                    self.removed.append(entry.path)
                case Skipped():
                    self.skipped[entry.why] += entry.count
        if found:
            digests, pack = await asyncio.to_thread(self._pack, [file.data for file in found])
            if pack is not None:
                await self._put(pack)
            for sha256, file in zip(digests, found, strict=True):
                self.files.append(ListedFile(file.path, file.mode, self._stored[sha256], file.object_id))
        if same:
            known = await asyncio.to_thread(self._earlier.contents, "object_id", [one.object_id for one in same])
            self.files += [ListedFile(one.path, one.mode, known[one.object_id], one.object_id) for one in same]

    def _pack(self, contents: Sequence[bytes]) -> tuple[list[str], Pack | None]:
        """The digests of contents, and a pack of those that are stored nowhere yet; for a thread."""
        digests = [hashlib.sha256(data).hexdigest() for data in contents]
        self._stored |= self._earlier.contents("sha256", set(digests) - self._stored.keys())
        new = {sha256: data for sha256, data in zip(digests, contents, strict=True) if sha256 not in self._stored}
        if not new:
            return digests, None
        pack = Pack.of(list(new.values()))
        for (sha256, data), place in zip(new.items(), pack.places, strict=True):
            self._stored[sha256] = Content(len(data), sha256, place)
        return digests, pack

    async def finish(self) -> None:
        """Returns when everything is stored.

        Raises:
            StoreUnavailable: it could not be.
        """
        await asyncio.gather(*self._puts)

    async def abandon(self) -> None:
        """Ends what is on its way."""
        for task in self._puts:
            task.cancel()
        await asyncio.gather(*self._puts, return_exceptions=True)

    async def _put(self, pack: Pack) -> None:
        await self._slots.acquire()
        for done in [task for task in self._puts if task.done()]:
            self._puts.discard(done)
            done.result()
        self._puts.add(asyncio.create_task(self._store(pack.data)))
        self.stored_bytes += len(pack.data)

    async def _store(self, data: bytes) -> None:
        try:
            await self._blobs.put(data)
        finally:
            self._slots.release()
