"""ModelService: base models that can be fine-tuned."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from codegraft.trainer.v1 import model_pb2, run_pb2
from codegraft.trainer.v1.run_pb2_grpc import ModelServiceServicer
from services.core.incoming import opened
from services.core.pages import bounds, token
from services.core.runtime import Runtime
from services.trainer.config import TrainerSettings
from services.trainer.models import ModelDesk

Context = grpc.aio.ServicerContext[Any, Any]


class ModelServicer(ModelServiceServicer):
    """See the proto for what every call does and which errors it has."""

    def __init__(self, runtime: Runtime, settings: TrainerSettings) -> None:
        self._desk = ModelDesk(runtime, settings)

    async def ListModels(self, request: run_pb2.ListModelsRequest, context: Context) -> run_pb2.ListModelsResponse:
        begin, end = bounds(request.page_size, request.page_token, "models")
        ids = await self._desk.ids()
        models = [await self._desk.get(id) for id in ids[begin:end]]
        next_token = token(end, "models") if end < len(ids) else ""
        return run_pb2.ListModelsResponse(models=models, next_page_token=next_token)

    async def GetModel(self, request: model_pb2.GetModelRequest, context: Context) -> model_pb2.GetModelResponse:
        return model_pb2.GetModelResponse(model=await self._desk.get(request.id))

    async def PushModel(
        self, request_iterator: AsyncIterator[model_pb2.PushModelRequest], context: Context
    ) -> model_pb2.PushModelResponse:
        header, chunks = await opened(request_iterator)
        model = await self._desk.push(header, chunks)
        return model_pb2.PushModelResponse(model=model)
