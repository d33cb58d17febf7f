"""What became of completions in editors."""

from __future__ import annotations

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
        self, project: str, completion_id: str, event: feedback_pb2.FeedbackEvent, *, characters: int = 0
    ) -> bool:
        """Records what became of a completion; False when that was recorded before.

        Args:
            completion_id: of the completion's first piece (``piece.started.completion_id``).
            characters: that were taken, or left after an edit.

        Raises:
            ProjectNotFound, InvalidArgument, ResourceExhausted.
        """
        request = feedback_pb2.RecordFeedbackRequest(
            parent=project_name(project), completion_id=completion_id, event=event, characters=characters
        )
        return (await self._caller.unary(self._stub.RecordFeedback, request, repeat=True)).recorded

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
