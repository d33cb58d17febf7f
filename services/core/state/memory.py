"""A state store in memory: what unit tests and single-process tools use in place of NATS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from services.core.errors import ResourceExists, RevisionMismatch
from services.core.state.store import Entry, check_key, covers
from services.core.telemetry import tracing


class MemoryState:
    """See :class:`~services.core.state.store.StateStore`. Belongs to one event loop."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}  # deleted keys stay, without a value, as in JetStream KV
        self._revision = 0
        self._watchers: set[asyncio.Queue[Entry]] = set()

    async def get(self, key: str) -> Entry | None:
        entry = self._entries.get(check_key(key))
        return entry if entry is not None and entry.value is not None else None

    async def create(self, key: str, value: bytes) -> int:
        if await self.get(key) is not None:
            raise ResourceExists(f"{key} exists already", field="name", hint="Choose another id.")
        return self._write(key, value)

    async def update(self, key: str, value: bytes, revision: int) -> int:
        await self._expect(key, revision)
        return self._write(key, value)

    async def delete(self, key: str, revision: int | None = None) -> None:
        if revision is not None:
            await self._expect(key, revision)
        if await self.get(key) is not None:
            self._write(key, None)

    async def list(self, prefix: str = "") -> list[Entry]:
        found = (entry for key, entry in self._entries.items() if covers(prefix, key) and entry.value is not None)
        return sorted(found, key=lambda entry: entry.key)

    async def keys(self, prefix: str = "") -> Sequence[str]:
        return [entry.key for entry in await self.list(prefix)]

    async def watch(self, prefix: str = "") -> AsyncIterator[Entry]:
        changes: asyncio.Queue[Entry] = asyncio.Queue()
        self._watchers.add(changes)
        try:
            current = [entry for key, entry in self._entries.items() if covers(prefix, key)]
            for entry in sorted(current, key=lambda entry: entry.revision):
                yield entry
            while True:
                entry = await changes.get()
                if covers(prefix, entry.key):
                    yield entry
        finally:
            self._watchers.discard(changes)

    async def _expect(self, key: str, revision: int) -> None:
        entry = await self.get(key)
        if entry is None or entry.revision != revision:
            raise RevisionMismatch(f"{key} is not at revision {revision}", field="etag")

    def _write(self, key: str, value: bytes | None) -> int:
        self._revision += 1
        entry = self._entries[key] = Entry(key, value, self._revision, tracing.traceparent())
        for changes in self._watchers:
            changes.put_nowait(entry)
        return self._revision
