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
from services.inference import completion_id, figures, kept
from services.inference.adapters.registry import Registry
from services.inference.feedback import DEFAULT_WINDOW, LONGEST_WINDOW, Feedback
from services.inference.kept import Kept
from services.inference.policy import Policies, Projects, called

Context = grpc.aio.ServicerContext[Any, Any]


class FeedbackServicer(feedback_pb2_grpc.FeedbackServiceServicer):
    """FeedbackService."""

    def __init__(
        self, feedback: Feedback, kept: Kept, projects: Projects, policies: Policies, registry: Registry
    ) -> None:
        self._feedback, self._kept, self._projects = feedback, kept, projects
        self._policies, self._registry = policies, registry

    async def RecordFeedback(self, request: pb.RecordFeedbackRequest, context: Context) -> pb.RecordFeedbackResponse:
        await self._check(request.parent)
        completion = completion_id.parse(request.completion_id, now=time.time())
        kept.check(request.text)
        news = await self._feedback.record(request.parent, completion, request.event, request.characters)
        figures.told(request.parent, self._registry.find(completion.adapter_sha256), completion.adapter_sha256, news)
        is_kept = bool(request.text) and await self._kept.keep(request.parent, completion, request.event, request.text)
        return pb.RecordFeedbackResponse(recorded=bool(news), text_kept=is_kept)

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
        serving = await self._policies.get(request.parent)
        for adapter in adapters:
            if adapter.adapter_sha256:
                sha256 = adapter.adapter_sha256
                adapter.checkpoint = called(serving, sha256) or self._staged(request.parent, sha256)
        return pb.GetAcceptanceResponse(adapters=adapters, since=since)

    async def ListKeptCompletions(
        self, request: pb.ListKeptCompletionsRequest, context: Context
    ) -> pb.ListKeptCompletionsResponse:
        await self._check(request.parent)
        found, token = await self._kept.page(request.parent, request.page_size, request.page_token)
        return pb.ListKeptCompletionsResponse(completions=found, next_page_token=token)

    async def DeleteKeptCompletions(
        self, request: pb.DeleteKeptCompletionsRequest, context: Context
    ) -> pb.DeleteKeptCompletionsResponse:
        await self._check(request.parent)
        return pb.DeleteKeptCompletionsResponse(deleted=await self._kept.delete(request.parent))

    def _staged(self, project: str, sha256: str) -> str:
        """What this replica calls a version, unless it has it by names of other projects only."""
        held = (each.names for each in self._registry.holdings() if each.version.sha256 == sha256)
        return next((name for each in held for name in each if names.project_of(name) == project), "")

    async def _check(self, parent: str) -> None:
        names.parse(names.PROJECT, parent, field="parent")
        if not await self._projects.exists(parent):
            raise ProjectNotFound(f"no project {parent}", field="parent", hint="Create the project first.", name=parent)
