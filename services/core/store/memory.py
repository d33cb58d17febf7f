"""An object store in memory: the fake that tests use, held to the contract by tests/contract/test_store.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from services.core.errors import ObjectNotFound
from services.core.store.store import StoredObject


class MemoryStore:
    """See :class:`services.core.store.store.ObjectStore`."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.modified: dict[str, datetime] = {}

    async def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        # A real store lets others run here; without it concurrent callers would never interleave in tests.
        await asyncio.sleep(0)
        if if_absent and key in self.data:
            return False
        self.data[key] = bytes(data)
        self.modified[key] = datetime.now(UTC)
        return True

    async def put_file(self, key: str, path: Path) -> None:
        await self.put(key, await asyncio.to_thread(path.read_bytes))

    async def put_stream(self, key: str, stream: BinaryIO, size: int) -> None:
        data = bytearray()
        while len(data) < size and (part := await asyncio.to_thread(stream.read, min(size - len(data), 1 << 20))):
            data += part
        await self.put(key, bytes(data))

    async def get(self, key: str) -> bytes:
        await asyncio.sleep(0)
        try:
            return self.data[key]
        except KeyError:
            raise ObjectNotFound(f"no object {key!r}", key=key) from None

    async def get_file(self, key: str, path: Path) -> None:
        data = await self.get(key)
        await asyncio.to_thread(path.write_bytes, data)

    async def size(self, key: str) -> int | None:
        await asyncio.sleep(0)
        data = self.data.get(key)
        return None if data is None else len(data)

    async def stat(self, key: str) -> StoredObject | None:
        await asyncio.sleep(0)
        return StoredObject(key, len(self.data[key]), self.modified[key]) if key in self.data else None

    async def objects(self, prefix: str) -> AsyncIterator[StoredObject]:
        for key in sorted(key for key in self.data if key.startswith(prefix)):
            if (found := await self.stat(key)) is not None:
                yield found

    async def list(self, prefix: str) -> AsyncIterator[str]:
        async for found in self.objects(prefix):
            yield found.key

    async def delete(self, key: str) -> None:
        await asyncio.sleep(0)
        self.data.pop(key, None)
