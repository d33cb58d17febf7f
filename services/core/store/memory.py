"""An object store in memory: the fake that tests use, held to the contract by tests/contract/test_store.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from services.core.errors import ObjectNotFound


class MemoryStore:
    """See :class:`services.core.store.store.ObjectStore`."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    async def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        # A real store lets others run here; without it concurrent callers would never interleave in tests.
        await asyncio.sleep(0)
        if if_absent and key in self.objects:
            return False
        self.objects[key] = bytes(data)
        return True

    async def put_file(self, key: str, path: Path) -> None:
        await self.put(key, await asyncio.to_thread(path.read_bytes))

    async def get(self, key: str) -> bytes:
        await asyncio.sleep(0)
        try:
            return self.objects[key]
        except KeyError:
            raise ObjectNotFound(f"no object {key!r}", key=key) from None

    async def get_file(self, key: str, path: Path) -> None:
        data = await self.get(key)
        await asyncio.to_thread(path.write_bytes, data)

    async def size(self, key: str) -> int | None:
        await asyncio.sleep(0)
        data = self.objects.get(key)
        return None if data is None else len(data)

    async def list(self, prefix: str) -> AsyncIterator[str]:
        for key in sorted(key for key in self.objects if key.startswith(prefix)):
            await asyncio.sleep(0)
            yield key

    async def delete(self, key: str) -> None:
        await asyncio.sleep(0)
        self.objects.pop(key, None)
