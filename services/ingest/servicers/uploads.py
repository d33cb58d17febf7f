"""UploadService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from codegraft.ingest.v1 import upload_pb2 as pb
from codegraft.ingest.v1.upload_pb2_grpc import UploadServiceServicer
from services.core.errors import InvalidArgument
from services.ingest.records import Tables
from services.ingest.uploads import Announced, Uploads

Context = grpc.aio.ServicerContext[Any, Any]


class UploadServicer(UploadServiceServicer):
    """See the proto for what every call does and which errors it has."""

    def __init__(self, tables: Tables, uploads: Uploads) -> None:
        self._tables = tables
        self._uploads = uploads

    async def UploadContent(
        self, request_iterator: AsyncIterator[pb.UploadContentRequest], context: Context
    ) -> pb.UploadContentResponse:
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidArgument(
                "the first message is no header", field="header", hint="Send the header, then the chunks."
            )
        header = first.header
        await self._tables.known(header.parent, "header.parent")
        announced = Announced(header.parent, header.sha256, header.size, header.filename[:255])
        return pb.UploadContentResponse(upload=await self._uploads.receive(announced, _chunks(request_iterator)))

    async def GetUpload(self, request: pb.GetUploadRequest, context: Context) -> pb.GetUploadResponse:
        await self._tables.known(request.parent)
        return pb.GetUploadResponse(upload=await self._uploads.find(request.parent, request.sha256))


async def _chunks(messages: AsyncIterator[pb.UploadContentRequest]) -> AsyncIterator[tuple[int, bytes]]:
    async for message in messages:
        if message.WhichOneof("part") != "chunk":
            raise InvalidArgument("only the first message is a header", field="chunk", hint="Send chunks after it.")
        yield message.chunk.offset, message.chunk.data
