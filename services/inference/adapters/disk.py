"""Adapter files on the local disk, by digest: what the store sent once, it need not send again.

A folder that several replicas may share, without a lock: a file appears whole (rename), is named by its SHA-256, and is
verified whenever it is read; what is read is held in memory, so anyone may evict a file at any time. The modification
time is that of the last use.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import time
from pathlib import Path

from services.core import log
from services.core.store import Blobs
from services.core.store.blobs import key

_ABANDONED = 600.0
"""Seconds after which a half-written file is a dead writer's."""
_LATER = 1.0
"""Seconds until a file is written: who fetches it wants to serve it, and writing 20 MB takes 45 ms of a core."""
_log = log.get("inference.disk")


class DiskCache:
    """The latest used files, up to a number of bytes. All methods belong to one event loop.

    Args:
        folder: made when it is not there.
        blobs: where a file comes from that is not here.
        limit: bytes; the file that was read last stays, even when it is larger.
        later: seconds between a file's coming from the store and its being written.
    """

    def __init__(self, folder: Path, blobs: Blobs, limit: int, *, later: float = _LATER) -> None:
        self._folder, self._blobs, self._limit, self._later = folder, blobs, limit, later
        self._writes: set[asyncio.Task[None]] = set()

    async def read(self, sha256: str) -> bytes:
        """A file's content, which has that digest; what the store has sent is written down soon after.

        Without space on the disk nothing is kept, and serving goes on.

        Raises:
            ObjectNotFound: neither the disk nor the store has it.
            DigestMismatch: the store has other bytes under that digest.
            InvalidArgument: that is no digest.
            StoreUnavailable: the store is needed and does not answer.
        """
        key(sha256)  # refuses what is no digest, and so no file's name
        if (data := await asyncio.to_thread(self._read, sha256)) is not None:
            return data
        data = await self._blobs.get(sha256)
        write = asyncio.create_task(self._write_later(sha256, data))
        self._writes.add(write)
        write.add_done_callback(self._writes.discard)
        return data

    async def written(self) -> None:
        """Waits until everything that was read so far is on the disk."""
        await asyncio.gather(*self._writes)

    async def _write_later(self, sha256: str, data: bytes) -> None:
        await asyncio.sleep(self._later)
        try:
            await asyncio.to_thread(self._write, sha256, data)
        except OSError as error:
            _log.warning("an adapter is not kept on disk", sha256=sha256, folder=str(self._folder), error=str(error))

    def _read(self, sha256: str) -> bytes | None:
        path = self._folder / sha256
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != sha256:
            _log.warning("a cached adapter is damaged, fetching it again", path=str(path))
            return None
        with contextlib.suppress(OSError):  # evicted since, or a disk that became read-only
            os.utime(path)
        return data

    def _write(self, sha256: str, data: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".{sha256}.{secrets.token_hex(4)}"
        try:
            temporary.write_bytes(data)
            temporary.replace(self._folder / sha256)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
        self._trim(sha256)

    def _trim(self, newest: str) -> None:
        """Deletes the longest unused files beyond the limit, and what dead writers left."""
        found: list[tuple[float, int, Path]] = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):  # the other replica trims too
                stat = entry.stat()
                if not entry.name.startswith("."):
                    found.append((stat.st_mtime, stat.st_size, Path(entry.path)))
                elif time.time() - stat.st_mtime > _ABANDONED:
                    Path(entry.path).unlink()
        size = sum(bytes for _, bytes, _ in found)
        for _, bytes, path in sorted(found):
            if size <= self._limit:
                return
            if path.name != newest:
                path.unlink(missing_ok=True)
                size -= bytes
