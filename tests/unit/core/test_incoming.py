"""Streams that open with a header: uploads to ingest, adapters and models to the trainer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from codegraft.ingest.v1.upload_pb2 import UploadContentRequest
from codegraft.trainer.v1.adapter_pb2 import ImportAdapterRequest
from codegraft.trainer.v1.model_pb2 import PushModelRequest
from services.core.errors import InvalidArgument
from services.core.incoming import opened

KINDS: list[Any] = [UploadContentRequest, ImportAdapterRequest, PushModelRequest]


async def stream(*messages: Any) -> AsyncIterator[Any]:
    for message in messages:
        yield message


def chunk(kind: Any, offset: int, data: bytes) -> Any:
    return kind(chunk={"offset": offset, "data": data})


@pytest.mark.parametrize("kind", KINDS)
async def test_the_header_then_the_chunks(kind: Any) -> None:
    header, chunks = await opened(stream(kind(header={}), chunk(kind, 0, b"ab"), chunk(kind, 2, b"c")))
    assert header == kind(header={}).header
    assert [found async for found in chunks] == [(0, b"ab"), (2, b"c")]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stream_that_opens_otherwise_is_refused(kind: Any) -> None:
    for messages in ([], [chunk(kind, 0, b"ab")], [kind()]):
        with pytest.raises(InvalidArgument) as caught:
            await opened(stream(*messages))
        assert caught.value.field == "header"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_second_header_is_refused(kind: Any) -> None:
    _, chunks = await opened(stream(kind(header={}), chunk(kind, 0, b"ab"), kind(header={})))
    assert await anext(chunks) == (0, b"ab")
    with pytest.raises(InvalidArgument) as caught:
        await anext(chunks)
    assert caught.value.field == "chunk"
