"""Uploads against a service that loses connections: every byte arrives once, in order, and is announced rightly."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codegraft.ingest.v1 import upload_pb2
from services.client import Addresses, AsyncCodegraft, retry
from services.client.content import CHUNK
from services.core import errors

pytestmark = pytest.mark.usefixtures("hasty")

CONTENT = bytes(range(256)) * 4096 * 3 + b"the end"  # three chunks and a bit


class Receiver:
    """UploadService as the contract describes it; `breaks` says after how many chunks each call is cut off."""

    def __init__(self, fake: Any, breaks: Iterator[int | errors.CodegraftError] | None = None) -> None:
        self.arrived = b""
        self.complete = False
        self.breaks = iter(breaks or ())
        self.calls = 0
        self.largest = 0
        self.header = upload_pb2.UploadHeader()
        fake.scripts["GetUpload"] = [self.get]
        fake.scripts["UploadContent"] = [self.receive]

    def get(self, request: Any) -> Any:
        assert request.parent == "projects/p"
        upload = upload_pb2.Upload(sha256=request.sha256, offset=len(self.arrived), complete=self.complete)
        return upload_pb2.GetUploadResponse(upload=upload)

    async def receive(self, requests: Any) -> Any:
        self.calls += 1
        cut = next(self.breaks, None)
        if isinstance(cut, errors.CodegraftError):
            raise cut
        chunks = 0
        async for request in requests:
            if request.HasField("header"):
                self.header = request.header
                continue
            if chunks == cut:
                raise errors.Unavailable("the connection broke")
            chunks += 1
            self.largest = max(self.largest, len(request.chunk.data))
            if request.chunk.offset != len(self.arrived):
                raise errors.UploadMismatch("wrong offset", field="chunk.offset")
            self.arrived += request.chunk.data
        if chunks == cut:
            raise errors.Unavailable("the connection broke")
        if len(self.arrived) != self.header.size or hashlib.sha256(self.arrived).hexdigest() != self.header.sha256:
            raise errors.UploadMismatch("not what was announced", field="header.sha256")
        self.complete = True
        name = f"{self.header.parent}/uploads/{self.header.sha256}"
        upload = upload_pb2.Upload(name=name, size=self.header.size, filename=self.header.filename, complete=True)
        return upload_pb2.UploadContentResponse(upload=upload)


@pytest.mark.parametrize("content", [CONTENT, b"", b"x", b"y" * CHUNK, b"z" * (CHUNK + 1)], ids=len)
async def test_bytes_arrive(codegraft: Any, fake: Any, content: bytes) -> None:
    receiver = Receiver(fake)
    upload = await codegraft.call(lambda c: c.sources.upload("p", content))
    assert receiver.arrived == content
    assert receiver.largest <= CHUNK == 1 << 20
    assert (upload.size, upload.complete) == (len(content), True)
    assert receiver.header.sha256 == hashlib.sha256(content).hexdigest()


async def test_a_file_arrives_under_its_name(codegraft: Any, fake: Any, tmp_path: Path) -> None:
    receiver = Receiver(fake)
    path = tmp_path / "lib ü.tar.gz"
    path.write_bytes(CONTENT)
    await codegraft.call(lambda c: c.sources.upload("p", path))
    assert receiver.arrived == CONTENT
    assert receiver.header.filename == "lib ü.tar.gz"
    receiver.complete = False
    await codegraft.call(lambda c: c.sources.upload("p", str(path), filename="other"))
    assert receiver.header.filename == "other"


@pytest.mark.parametrize("breaks", [[0], [1], [2, 1], [4], [0, 0, 3]], ids=str)
async def test_a_broken_upload_goes_on_where_it_stopped(codegraft: Any, fake: Any, breaks: list[int]) -> None:
    receiver = Receiver(fake, iter(breaks))
    await codegraft.call(lambda c: c.sources.upload("p", CONTENT))
    assert receiver.arrived == CONTENT
    assert receiver.calls == len(breaks) + 1


async def test_an_upload_that_gets_forward_is_never_given_up(codegraft: Any, fake: Any) -> None:
    content = b"0123456789abcdef" * (CHUNK // 16) * 12
    receiver = Receiver(fake, iter([1] * 11))  # more breaks than there are tries
    await codegraft.call(lambda c: c.sources.upload("p", content))
    assert receiver.arrived == content
    assert receiver.calls > retry.ATTEMPTS


async def test_an_upload_that_does_not_get_forward_is_given_up(codegraft: Any, fake: Any) -> None:
    receiver = Receiver(fake, iter([errors.StoreUnavailable("the store is away")] * 100))
    with pytest.raises(errors.StoreUnavailable, match="the store is away"):
        await codegraft.call(lambda c: c.sources.upload("p", CONTENT))
    assert receiver.calls == retry.ATTEMPTS


async def test_content_that_is_there_is_not_sent_again(codegraft: Any, fake: Any) -> None:
    receiver = Receiver(fake)
    receiver.arrived, receiver.complete = CONTENT, True
    await codegraft.call(lambda c: c.sources.upload("p", CONTENT))
    assert receiver.largest == 0


async def test_bytes_of_a_broken_call_that_arrive_late_are_no_obstacle(codegraft: Any, fake: Any) -> None:
    receiver = Receiver(fake)
    told = receiver.get

    def stale(request: Any) -> Any:  # the offset as it was before the last chunk of the broken call was written
        answer = told(request)
        receiver.arrived = CONTENT[:CHUNK]
        return answer

    fake.scripts["GetUpload"] = [stale, told]
    await codegraft.call(lambda c: c.sources.upload("p", CONTENT))
    assert receiver.arrived == CONTENT


async def test_a_limit_is_told_at_once(codegraft: Any, fake: Any) -> None:
    receiver = Receiver(fake, iter([errors.LimitExceeded("too large", field="header.size")]))
    with pytest.raises(errors.LimitExceeded):
        await codegraft.call(lambda c: c.sources.upload("p", CONTENT))
    assert receiver.calls == 1


async def test_a_refusal_while_chunks_are_on_the_way_is_told_as_what_it_is(codegraft: Any, fake: Any) -> None:
    """grpc.aio would make it an INTERNAL "Internal error from Core" now and then."""

    async def refuse(requests: Any) -> Any:
        await anext(requests)
        raise errors.LimitExceeded("too large")

    Receiver(fake)
    fake.scripts["UploadContent"] = [refuse]
    for _ in range(20):
        with pytest.raises(errors.LimitExceeded):
            await codegraft.call(lambda c: c.sources.upload("p", CONTENT))


async def test_an_upload_does_not_hold_up_the_event_loop_and_can_be_cancelled(fake: Any, address: str) -> None:
    started = asyncio.Event()

    async def never(requests: Any) -> Any:
        started.set()
        await asyncio.sleep(30)

    Receiver(fake)
    fake.scripts["UploadContent"] = [never]
    async with AsyncCodegraft(Addresses(address, address, address, address)) as client:
        uploading = asyncio.create_task(client.sources.upload("p", CONTENT))
        await asyncio.wait_for(started.wait(), 5)
        uploading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await uploading
        await asyncio.wait_for(fake.cancelled.wait(), 5)


async def test_a_file_that_is_not_there_is_told_without_a_call(codegraft: Any, fake: Any, tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match="cannot be read") as caught:
        await codegraft.call(lambda c: c.sources.upload("p", tmp_path / "nothing"))
    assert caught.value.field == "path"
    with pytest.raises(errors.InvalidArgument):
        await codegraft.call(lambda c: c.sources.upload("p", tmp_path))
    assert not fake.requests


@pytest.mark.parametrize("change", ["vanishes", "shrinks", "grows", "changes"])
async def test_a_file_that_changes_on_the_way_is_refused(
    codegraft: Any, fake: Any, tmp_path: Path, change: str
) -> None:
    receiver = Receiver(fake)
    path = tmp_path / "lib"
    path.write_bytes(CONTENT)
    told = receiver.get

    def meanwhile(request: Any) -> Any:
        match change:
            case "vanishes":
                path.unlink()
            case "shrinks":
                path.write_bytes(CONTENT[:-1])
            case "grows":
                path.write_bytes(CONTENT + b"1")
            case "changes":
                path.write_bytes(b"!" + CONTENT[1:])
        return told(request)

    fake.scripts["GetUpload"] = [meanwhile]
    with pytest.raises(errors.UploadMismatch):
        await codegraft.call(lambda c: c.sources.upload("p", path))


async def test_what_is_added_names_its_upload(codegraft: Any, fake: Any) -> None:
    Receiver(fake)
    await codegraft.call(lambda c: c.sources.add_archive("p", CONTENT, source_id="lib"))
    (request,) = fake.requests["CreateSource"]
    assert request.source.archive.upload == f"projects/p/uploads/{hashlib.sha256(CONTENT).hexdigest()}"
    assert (request.parent, request.source_id) == ("projects/p", "lib")
    assert request.request_id
