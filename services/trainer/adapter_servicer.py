"""AdapterService: adapters out of the house and into it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from codegraft.common.v1.artifact_pb2 import FileChunk
from codegraft.trainer.v1 import adapter_pb2 as pb
from codegraft.trainer.v1.adapter_pb2_grpc import AdapterServiceServicer
from services.core.errors import InvalidArgument
from services.core.incoming import opened
from services.core.runtime import Runtime
from services.trainer.adapters.export import Exporter
from services.trainer.adapters.imports import Importer
from services.trainer.config import TrainerSettings
from services.trainer.records import Tables

Context = grpc.aio.ServicerContext[Any, Any]


class AdapterServicer(AdapterServiceServicer):
    """See the proto for what every call does and which errors it has."""

    def __init__(self, runtime: Runtime, settings: TrainerSettings, tables: Tables) -> None:
        self._tables = tables
        self._exporter = Exporter(runtime.artifacts, settings.cache_dir)
        self._importer = Importer(runtime, settings, tables)

    async def DownloadCheckpoint(
        self, request: pb.DownloadCheckpointRequest, context: Context
    ) -> AsyncIterator[pb.DownloadCheckpointResponse]:
        if request.offset < 0:
            raise InvalidArgument("offset is negative", field="offset", hint="Use 0 for the whole.")
        checkpoint = (await self._tables.find_checkpoint(request.name)).name
        async with self._exporter.begin(checkpoint, request.format, request.gguf_type) as export:
            async with aclosing(export.make()) as making:
                async for progress in making:
                    yield pb.DownloadCheckpointResponse(progress=progress)
            header = pb.DownloadHeader(checkpoint=checkpoint, sha256=export.manifest.sha256, files=export.files)
            yield pb.DownloadCheckpointResponse(header=header)
            async with aclosing(export.chunks(request.offset)) as chunks:
                async for offset, data in chunks:
                    yield pb.DownloadCheckpointResponse(chunk=FileChunk(offset=offset, data=data))

    async def ImportAdapter(
        self, request_iterator: AsyncIterator[pb.ImportAdapterRequest], context: Context
    ) -> pb.ImportAdapterResponse:
        header, chunks = await opened(request_iterator)
        run = await self._importer.receive(header, chunks)
        return pb.ImportAdapterResponse(run=run)
