"""Every operation in one table: what is served is what /openapi.json describes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.api.answers import ChatChunk, ChatCompletion, TextCompletion
from services.gateway.api.asks import ChatAsk, CompletionAsk, FeedbackAsk, FimAsk, InfillAsk
from services.gateway.api.completing import Completing
from services.gateway.api.desk import Desk
from services.gateway.api.feedback import FeedbackAnswer, FeedbackDesk
from services.gateway.api.health import Health, HealthDesk, ServicesHealth
from services.gateway.api.infill import Infilling
from services.gateway.api.infill_answer import InfillAnswer, InfillChunk
from services.gateway.api.listing import Listing, ModelCard, ModelList

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation."""

    method: str
    path: str
    """With names of parameters in braces."""
    endpoint: Endpoint
    summary: str
    answer: type
    ask: type[BaseModel] | None = None
    """Of its body."""
    event: type | None = None
    """Of a streamed answer's events."""
    takes_session: bool = False
    needs_key: bool = True


def operations(desk: Desk) -> Sequence[Operation]:
    """All of them."""
    completing, infilling, listing = Completing(desk), Infilling(desk), Listing(desk)
    feedback, health = FeedbackDesk(desk), HealthDesk(desk.client, desk.settings)
    return (
        Operation(
            "POST",
            "/v1/completions",
            completing.completions,
            "Completes code; with a suffix the model fills in the middle.",
            TextCompletion,
            CompletionAsk,
            TextCompletion,
            takes_session=True,
        ),
        Operation(
            "POST",
            "/v1/fim/completions",
            completing.fim,
            "The same in Mistral's shape.",
            ChatCompletion,
            FimAsk,
            ChatChunk,
            takes_session=True,
        ),
        Operation(
            "POST",
            "/v1/chat/completions",
            completing.chat,
            "Answers a conversation; instruct models only.",
            ChatCompletion,
            ChatAsk,
            ChatChunk,
        ),
        Operation(
            "POST",
            "/infill",
            infilling.infill,
            "Completes code as llama.cpp's server does.",
            InfillAnswer,
            InfillAsk,
            InfillChunk,
            takes_session=True,
        ),
        Operation("GET", "/v1/models", listing.models, "The models that a request may name.", ModelList),
        Operation("GET", "/v1/models/{model}", listing.model, "One of them.", ModelCard),
        Operation(
            "POST",
            "/v1/feedback",
            feedback.feedback,
            "Tells what became of a completion.",
            FeedbackAnswer,
            FeedbackAsk,
        ),
        Operation("GET", "/health", health.health, "Whether requests are answered.", Health, needs_key=False),
        Operation(
            "GET", "/health/services", health.services, "How each service behind the gateway answers.", ServicesHealth
        ),
    )
