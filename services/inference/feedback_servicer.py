"""The gRPC face of feedback: proto in, domain call, proto out."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from codegraft.inference.v1 import feedback_pb2 as pb
from codegraft.inference.v1 import feedback_pb2_grpc
from services.core import names
from services.core.errors import InvalidArgument, ProjectNotFound
from services.inference import completion_id
from services.inference.adapters.registry import Registry
from services.inference.feedback import DEFAULT_WINDOW, LONGEST_WINDOW, Feedback
from services.inference.policy import Projects

Context = grpc.aio.ServicerContext[Any, Any]


class FeedbackServicer(feedback_pb2_grpc.FeedbackServiceServicer):
    """FeedbackService."""

    def __init__(self, feedback: Feedback, projects: Projects, registry: Registry) -> None:
        self._feedback, self._projects, self._registry = feedback, projects, registry

    async def RecordFeedback(self, request: pb.RecordFeedbackRequest, context: Context) -> pb.RecordFeedbackResponse:
        await self._check(request.parent)
        completion = completion_id.parse(request.completion_id, now=time.time())
        recorded = await self._feedback.record(request.parent, completion, request.event, request.characters)
        return pb.RecordFeedbackResponse(recorded=recorded)

    async def GetAcceptance(self, request: pb.GetAcceptanceRequest, context: Context) -> pb.GetAcceptanceResponse:
        await self._check(request.parent)
        window = request.window.ToTimedelta() if request.HasField("window") else DEFAULT_WINDOW
        if not timedelta() < window <= LONGEST_WINDOW:
            raise InvalidArgument(
                f"a window of {window} cannot be looked at",
                field="window",
                hint=f"Use more than 0 and at most {LONGEST_WINDOW.days} days.",
            )
        since = Timestamp(seconds=int(time.time() - window.total_seconds()))
        adapters = await self._feedback.acceptance(request.parent, since.seconds)
        for adapter in adapters:
            if version := self._registry.find(adapter.adapter_sha256) if adapter.adapter_sha256 else None:
                adapter.checkpoint = version.checkpoint
        return pb.GetAcceptanceResponse(adapters=adapters, since=since)

    async def _check(self, parent: str) -> None:
        names.parse(names.PROJECT, parent, field="parent")
        if not await self._projects.exists(parent):
            raise ProjectNotFound(f"no project {parent}", field="parent", hint="Create the project first.", name=parent)
