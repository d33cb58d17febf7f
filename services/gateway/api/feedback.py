"""/v1/feedback: what became of a completion."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from codegraft.inference.v1 import feedback_pb2 as pb
from services.gateway.api import desk
from services.gateway.api.asks import FeedbackAsk
from services.gateway.api.desk import Desk

_EVENTS = {
    "shown": pb.FEEDBACK_EVENT_SHOWN,
    "accepted": pb.FEEDBACK_EVENT_ACCEPTED,
    "rejected": pb.FEEDBACK_EVENT_REJECTED,
    "edited": pb.FEEDBACK_EVENT_EDITED,
}


@dataclass(frozen=True, slots=True)
class FeedbackAnswer:
    """Answer of /v1/feedback."""

    recorded: bool
    """Whether it was news; false for what was recorded before."""


class FeedbackDesk:
    """The operation."""

    def __init__(self, at: Desk) -> None:
        self._desk = at

    async def feedback(self, request: Request) -> Response:
        """POST /v1/feedback"""
        ask = await self._desk.read(request, FeedbackAsk)
        target = await self._desk.target(request, ask.model)
        completion = ask.completion_id.removeprefix("chatcmpl-").removeprefix("cmpl-")
        recorded = await self._desk.client.feedback.record(
            target.project, completion, _EVENTS[ask.event], characters=ask.accepted_characters, text=ask.text
        )
        return desk.answer(FeedbackAnswer(recorded))
