"""Storing what a source's entries hold: each content once, many in a pack, and nothing that is stored already."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

from services.core.store import Blobs, Pack
from services.ingest.files import Entry, FoundFile, SameFile, Skipped
from services.ingest.listing import Content, ListedFile


class Contents:
    """Collects the files of one source.

    Args:
        earlier: the files of the last fetch; their contents are not stored again.
        puts: packs that are on their way to the store at once; each is held in memory.
    """

    def __init__(self, blobs: Blobs, earlier: Iterable[ListedFile], puts: int) -> None:
        self._blobs = blobs
        self._by_sha256: dict[str, Content] = {}
        self._by_object: dict[str, Content] = {}
        for file in earlier:
            self._by_sha256[file.content.sha256] = file.content
            if file.object_id:
                self._by_object[file.object_id] = file.content
        self._slots = asyncio.Semaphore(puts)
        self._puts: set[asyncio.Task[None]] = set()
        self.files: list[ListedFile] = []
        self.skipped: Counter[str] = Counter()
        self.stored_bytes = 0
        """Bytes of content that was new."""

    @property
    def object_ids(self) -> frozenset[str]:
        """git's ids of the contents that are stored."""
        return frozenset(self._by_object)

    async def add(self, batch: Sequence[Entry]) -> None:
        """Takes entries; returns when their contents are stored or on their way.

        Raises:
            StoreUnavailable: an earlier batch could not be stored.
        """
        self.skipped.update(entry.why for entry in batch if isinstance(entry, Skipped))
        found = [entry for entry in batch if isinstance(entry, FoundFile)]
        digests = await asyncio.to_thread(lambda: [hashlib.sha256(file.data).hexdigest() for file in found])
        new = {sha256: file.data for sha256, file in zip(digests, found, strict=True) if sha256 not in self._by_sha256}
        if new:
            pack = await asyncio.to_thread(Pack.of, list(new.values()))
            for (sha256, data), place in zip(new.items(), pack.places, strict=True):
                self._by_sha256[sha256] = Content(len(data), sha256, place)
            await self._put(pack)
        for sha256, file in zip(digests, found, strict=True):
            self.files.append(ListedFile(file.path, file.mode, self._by_sha256[sha256], file.object_id))
        for same in batch:
            if isinstance(same, SameFile):
                content = self._by_object[same.object_id]
                self.files.append(ListedFile(same.path, same.mode, content, same.object_id))

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
