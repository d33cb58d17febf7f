"""Uploads that break off at awkward moments, and those that come twice at once."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.core.runtime import Runtime
from services.ingest.arriving import Arriving
from services.ingest.config import IngestSettings
from services.ingest.records import BUCKET, Tables
from services.ingest.uploads import BATCH_CHUNKS, Announced, Uploads

CHUNK = 1 << 16
CONTENT = b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(10 * CHUNK // 32))
ANNOUNCED = Announced("projects/p", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), "content")


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    runtime = Runtime.memory(tmp_path / "cache")
    settings = IngestSettings(cache_dir=tmp_path)
    return Uploads(
        Tables.of(runtime.state(BUCKET)).uploads, runtime.blobs, tmp_path / "spool", settings.ingest_max_upload_bytes
    )


async def chunks(begin: int = 0) -> AsyncIterator[tuple[int, bytes]]:
    for at in range(begin, len(CONTENT), CHUNK):
        yield at, CONTENT[at : at + CHUNK]


async def arrived(uploads: Uploads) -> int:
    return (await uploads.find(ANNOUNCED.project, ANNOUNCED.sha256)).offset


async def test_a_call_that_ends_while_its_bytes_are_written_loses_and_doubles_nothing(
    uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, go_on = threading.Event(), threading.Event()
    append = Arriving.append

    def slow(self: Arriving, data: bytes) -> None:
        writing.set()
        go_on.wait(5)
        append(self, data)

    monkeypatch.setattr(Arriving, "append", slow)
    call = asyncio.create_task(uploads.receive(ANNOUNCED, chunks()))
    await asyncio.to_thread(writing.wait, 5)
    call.cancel()
    await asyncio.sleep(0.05)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    offset = await arrived(uploads)
    assert offset == BATCH_CHUNKS * CHUNK, "what was on its way to the disk is there, once"
    done = await uploads.receive(ANNOUNCED, chunks(offset))
    assert done.complete and done.size == len(CONTENT)


async def test_chunks_that_wait_to_be_written_survive_a_broken_call(uploads: Uploads) -> None:
    async def broken() -> AsyncIterator[tuple[int, bytes]]:
        async for at, data in chunks():
            if at == (BATCH_CHUNKS + 1) * CHUNK:
                raise ConnectionError
            yield at, data

    with pytest.raises(ConnectionError):
        await uploads.receive(ANNOUNCED, broken())
    assert await arrived(uploads) == (BATCH_CHUNKS + 1) * CHUNK


async def test_who_waits_for_the_same_upload_finds_it_complete(uploads: Uploads) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def first() -> AsyncIterator[tuple[int, bytes]]:
        begun.set()
        await go_on.wait()
        async for chunk in chunks():
            yield chunk

    async def second() -> AsyncIterator[tuple[int, bytes]]:
        raise AssertionError("nothing of it is read")
        yield 0, b""

    one = asyncio.create_task(uploads.receive(ANNOUNCED, first()))
    await begun.wait()
    other = asyncio.create_task(uploads.receive(ANNOUNCED, second()))
    await asyncio.sleep(0.05)
    go_on.set()
    assert await one == await other
