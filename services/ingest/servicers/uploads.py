"""UploadService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from codegraft.ingest.v1 import upload_pb2 as pb
from codegraft.ingest.v1.upload_pb2_grpc import UploadServiceServicer
from services.core.auth.caller import current
from services.core.incoming import opened
from services.core.quota.places import Places
from services.core.quota.quotas import owners
from services.ingest.records import Tables
from services.ingest.uploads import Announced, Uploads

Context = grpc.aio.ServicerContext[Any, Any]


class UploadServicer(UploadServiceServicer):
    """See the proto for what every call does and which errors it has."""

    def __init__(self, tables: Tables, uploads: Uploads, places: Places) -> None:
        self._tables = tables
        self._places = places
        self._uploads = uploads

    async def UploadContent(
        self, request_iterator: AsyncIterator[pb.UploadContentRequest], context: Context
    ) -> pb.UploadContentResponse:
        header, chunks = await opened(request_iterator)
        project = await self._tables.known(header.parent, "header.parent")
        caller, since = current(), project.create_time.ToNanoseconds()
        announced = Announced(header.parent, header.sha256, header.size, header.filename[:255], caller.subject, since)
        self._uploads.check(announced)
        async with self._places.claim(owners(caller, header.parent), announced.name, announced.size):
            return pb.UploadContentResponse(upload=await self._uploads.receive(announced, chunks))

    async def GetUpload(self, request: pb.GetUploadRequest, context: Context) -> pb.GetUploadResponse:
        since = (await self._tables.known(request.parent)).create_time.ToNanoseconds()
        return pb.GetUploadResponse(upload=await self._uploads.find(request.parent, request.sha256, since))
