"""Uploads: bytes that arrive in chunks, may break off, and become one blob once they are all there and right."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from pathlib import Path

from codegraft.ingest.v1.upload_pb2 import Upload
from services.core import names
from services.core.errors import InvalidArgument, LimitExceeded, ResourceExists, UploadMismatch
from services.core.state import Table
from services.core.store import Blobs
from services.ingest.arriving import Arriving

_SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_CHUNK = 1 << 20
BATCH_CHUNKS = 4
"""Chunks that are written together."""
PIPED_BYTES = 32 << 20
"""Size from which content goes on to the store while it still arrives."""
PIPED_AT_ONCE = 4
"""Uploads for which that is done: a slow sender holds a connection to the store for as long as it takes."""


@dataclass(frozen=True, slots=True)
class Announced:
    """What an upload's header says of the content."""

    project: str
    sha256: str
    size: int
    """In bytes."""
    filename: str
    creator: str = ""
    """Who sends it."""
    since: int = 0
    """When the project was made, nanoseconds since 1970: it goes on with nothing that one of its name before began."""

    @property
    def name(self) -> str:
        """Resource name of the upload."""
        return f"{self.project}/uploads/{self.sha256}"


class Uploads:
    """Arriving content waits in a spool file of this process; what is complete is a blob and a record.

    The blob comes before the record: what the record names is there. A broken upload leaves its spool file, from whose
    end it goes on; a process that dies loses no more than that.
    """

    def __init__(self, table: Table[Upload], blobs: Blobs, spool: Path, max_bytes: int) -> None:
        self._table = table
        self._blobs = blobs
        self._spool = spool
        self._max_bytes = max_bytes
        self._locks: dict[str, asyncio.Lock] = {}
        self._piping = 0

    async def find(self, project: str, sha256: str, since: int = 0) -> Upload:
        """The upload with its offset; one of which nothing arrived has offset 0.

        Args:
            since: when the project was made, nanoseconds since 1970.
        """
        check_sha256(sha256)
        name = f"{project}/uploads/{sha256}"
        if (there := await self._table.find(name)) is not None:
            return there
        spooled = self._file(name, since)
        return Upload(name=name, sha256=sha256, offset=spooled.stat().st_size if spooled.exists() else 0)

    async def get(self, name: str) -> Upload:
        """A complete upload. Raises UploadNotFound."""
        return await self._table.get(name)

    async def receive(self, announced: Announced, chunks: AsyncIterator[tuple[int, bytes]]) -> Upload:
        """Takes chunks of (position, bytes), continuing what arrived before, and stores the whole when it is complete.

        Raises:
            InvalidArgument: the digest or the size is none, or a chunk is too large.
            LimitExceeded: the content is larger than uploads may be.
            UploadMismatch: a chunk does not continue what arrived, or the whole is not what was announced; in the
                second case what arrived is thrown away.
            StoreUnavailable: the store failed; what arrived is kept, so that the call can be repeated without chunks.
        """
        self.check(announced)
        if (there := await self._table.find(announced.name)) is not None:
            return there
        async with self._locks.setdefault(announced.name, asyncio.Lock()):
            if (there := await self._table.find(announced.name)) is not None:  # another call was faster
                return there
            path = self._file(announced.name, announced.since)
            arriving = await asyncio.to_thread(Arriving, path, announced.size, announced.sha256)
            sending = self._begin_sending(announced, arriving)
            try:
                await self._append(arriving, announced, chunks)
                arriving.verify()
                if sending is not None:
                    await sending
                else:
                    await self._blobs.put_stream(announced.sha256, arriving.reader(), announced.size)
            except BaseException:
                arriving.give_up()
                if sending is not None:
                    await asyncio.gather(sending, return_exceptions=True)
                raise
            arriving.give_up()
            upload = await self._record(announced)
            path.unlink(missing_ok=True)
        self._locks.pop(announced.name, None)
        return upload

    def _begin_sending(self, announced: Announced, arriving: Arriving) -> asyncio.Task[None] | None:
        """Sends large content on to the store while it arrives; small content waits until it is complete."""
        if announced.size < PIPED_BYTES or self._piping >= PIPED_AT_ONCE:
            return None

        async def send() -> None:
            self._piping += 1
            try:
                await self._blobs.put_stream(announced.sha256, arriving.reader(), announced.size)
            finally:
                self._piping -= 1

        return asyncio.create_task(send())

    async def _append(self, arriving: Arriving, announced: Announced, chunks: AsyncIterator[tuple[int, bytes]]) -> None:
        waiting: list[bytes] = []
        reached = arriving.arrived
        try:
            async for offset, data in chunks:
                _check_chunk(offset, data, reached, announced.size)
                waiting.append(data)
                reached += len(data)
                if len(waiting) == BATCH_CHUNKS:
                    batch, waiting = b"".join(waiting), []
                    await _to_its_end(asyncio.to_thread(arriving.append, batch))
        finally:  # also of a call that breaks off nothing is lost
            arriving.append(b"".join(waiting))
        if arriving.arrived < announced.size:
            raise UploadMismatch(
                f"{arriving.arrived} of {announced.size} bytes have arrived",
                field="header.size",
                hint="Send the rest: call again, from the offset that GetUpload tells.",
            )

    async def _record(self, announced: Announced) -> Upload:
        upload = Upload(
            name=announced.name,
            sha256=announced.sha256,
            size=announced.size,
            filename=announced.filename,
            offset=announced.size,
            complete=True,
            creator=announced.creator,
        )
        upload.complete_time.GetCurrentTime()
        try:
            return await self._table.create(upload)
        except ResourceExists:  # another replica received the same
            return await self._table.get(announced.name)

    def check(self, announced: Announced) -> None:
        """Raises InvalidArgument or LimitExceeded for what no chunks could make good."""
        check_sha256(announced.sha256)
        if announced.size < 0:
            raise InvalidArgument("a size cannot be negative", field="header.size", hint="Give the size in bytes.")
        if announced.size > self._max_bytes:
            raise LimitExceeded(
                f"the content has {announced.size:,} bytes, and uploads may have {self._max_bytes:,}",
                field="header.size",
                hint="Upload parts of it as sources of their own, or raise CODEGRAFT_INGEST_MAX_UPLOAD_BYTES.",
            )

    def _file(self, name: str, since: int) -> Path:
        project = names.parse(names.UPLOAD, name)["project"]
        return self._spool / f"{project}-{since}-{name.rsplit('/', 1)[1]}"


async def _to_its_end(work: Coroutine[None, None, None]) -> None:
    """Awaits what a thread does; who is cancelled meanwhile goes on once it is done, for it cannot be stopped."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _check_chunk(offset: int, data: bytes, reached: int, size: int) -> None:
    if offset != reached:
        raise UploadMismatch(
            f"a chunk begins at {offset}, but {reached} bytes have arrived",
            field="chunk.offset",
            hint="Ask GetUpload for the offset and go on from there.",
        )
    if len(data) > MAX_CHUNK:
        raise InvalidArgument("a chunk is larger than 1 MiB", field="chunk.data", hint="Send smaller chunks.")
    if offset + len(data) > size:
        raise UploadMismatch(f"more bytes arrive than the {size} announced", field="header.size", hint="Correct it.")


def check_sha256(sha256: str, field: str = "sha256") -> None:
    """Raises InvalidArgument unless it is a SHA-256 in lower-case hexadecimal."""
    if not _SHA256.fullmatch(sha256):
        raise InvalidArgument(
            f"{sha256[:80]!r} is no SHA-256", field=field, hint="Give 64 lower-case hexadecimal digits."
        )
