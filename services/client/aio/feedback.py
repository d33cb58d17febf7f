"""What became of completions in editors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta

import grpc
from google.protobuf.duration_pb2 import Duration

from codegraft.inference.v1 import feedback_pb2, feedback_pb2_grpc
from services.client.aio.caller import Caller
from services.client.aio.ingest import project_name


class Feedback:
    """Feedback on completions, and acceptance per adapter."""

    def __init__(self, channel: grpc.aio.Channel, caller: Caller) -> None:
        self._stub = feedback_pb2_grpc.FeedbackServiceStub(channel)
        self._caller = caller

    async def record(
        self,
        project: str,
        completion_id: str,
        event: feedback_pb2.FeedbackEvent,
        *,
        characters: int = 0,
        text: str = "",
    ) -> bool:
        """Records what became of a completion; False when that was recorded before.

        Args:
            completion_id: of the completion's first piece (``piece.started.completion_id``).
            characters: that were taken, or left after an edit.
            text: that was shown, taken, or left after an edit; kept only where the project says so.

        Raises:
            ProjectNotFound, InvalidArgument, ResourceExhausted.
        """
        request = feedback_pb2.RecordFeedbackRequest(
            parent=project_name(project), completion_id=completion_id, event=event, characters=characters, text=text
        )
        return (await self._caller.unary(self._stub.RecordFeedback, request, repeat=True)).recorded

    async def kept(self, project: str, page_size: int = 0) -> AsyncIterator[feedback_pb2.KeptCompletion]:
        """The texts that were kept of a project's completions, the oldest first; an operator's call.

        Raises:
            ProjectNotFound, PermissionDenied.
        """
        request = feedback_pb2.ListKeptCompletionsRequest(parent=project_name(project), page_size=page_size)
        async for page in self._caller.pages(self._stub.ListKeptCompletions, request):
            for completion in page.completions:
                yield completion

    async def delete_kept(self, project: str) -> int:
        """Deletes all of them; returns of how many completions. The counts stay.

        Raises:
            ProjectNotFound, PermissionDenied.
        """
        request = feedback_pb2.DeleteKeptCompletionsRequest(parent=project_name(project))
        return (await self._caller.unary(self._stub.DeleteKeptCompletions, request, repeat=True)).deleted

    async def acceptance(self, project: str, window: timedelta | None = None) -> feedback_pb2.GetAcceptanceResponse:
        """How many completions were taken, per version; the base model's are the control.

        Args:
            window: how far to look back; 7 days when None, at most 90.

        Raises:
            ProjectNotFound, InvalidArgument.
        """
        request = feedback_pb2.GetAcceptanceRequest(parent=project_name(project))
        if window is not None:
            request.window.CopyFrom(Duration(seconds=int(window.total_seconds())))
        return await self._caller.unary(self._stub.GetAcceptance, request, repeat=True)
