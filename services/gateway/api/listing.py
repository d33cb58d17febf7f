"""/v1/models: the base model, and for every project of the caller's its alias and its adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

from google.protobuf.timestamp_pb2 import Timestamp
from starlette.requests import Request
from starlette.responses import Response

from codegraft.inference.v1.serving_pb2 import ServingMode
from codegraft.trainer.v1.checkpoint_pb2 import Checkpoint
from services.core import log
from services.core.errors import ModelNotFound, Unavailable
from services.gateway.api import desk
from services.gateway.api.desk import PROJECT_HEADER, Desk
from services.gateway.api.models import BASE, alias, checkpoint_alias

_AT_ONCE = 8
"""Calls of one list."""
_log = log.get("gateway.models")


@dataclass(frozen=True, slots=True)
class ModelDetails:
    """What OpenAI's API has no field for."""

    base_model: str
    project: str = ""
    """Empty for the base model by its own name."""
    policy: Literal["", "OFF", "LATEST_BEST", "PINNED"] = ""
    """An alias's serving policy."""
    checkpoint: str = ""
    """Full name of the checkpoint that answers now; empty for the base model."""
    adapter_sha256: str = ""
    """Version of that checkpoint."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One model."""

    id: str
    """What requests call it."""
    object: Literal["model"]
    created: int
    """Seconds since 1970; 0 when it is not known."""
    owned_by: str
    codegraft: ModelDetails


@dataclass(frozen=True, slots=True)
class ModelList:
    """All of them."""

    object: Literal["list"]
    data: list[ModelCard]


class Listing:
    """The two operations."""

    def __init__(self, at: Desk) -> None:
        self._desk = at

    async def models(self, request: Request) -> Response:
        """GET /v1/models"""
        return desk.answer(ModelList("list", [card async for card in self._cards(request)]))

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{model}"""
        wanted: str = request.path_params["model"]
        async for card in self._cards(request):
            if card.id == wanted:
                return desk.answer(card)
        raise ModelNotFound(f"there is no model {wanted[:80]!r}", field="model", hint="GET /v1/models lists them.")

    async def _cards(self, request: Request) -> AsyncIterator[ModelCard]:
        client, base = self._desk.client, ""
        async for model in client.completions.models():
            base = model.id
            yield _card(base, ModelDetails(base))
        named: str = request.path_params.get("project") or request.headers.get(PROJECT_HEADER, "")
        if named:
            projects = [await client.projects.get(named)]
        else:
            projects = [project async for project in client.projects.list()]
        for project in projects:
            name = project.name.removeprefix("projects/")
            serving = (await client.serving.get(name)).serving
            policy = ServingMode.Name(serving.mode).removeprefix("SERVING_MODE_")
            details = ModelDetails(base, name, policy, serving.wanted_checkpoint, serving.wanted_sha256)  # type: ignore[arg-type]
            yield _card(alias(name), details, project.create_time)
            yield _card(alias(name, BASE), ModelDetails(base, name), project.create_time)
            for checkpoint in await self._checkpoints(name):
                if checkpoint.base_model == base:
                    details = ModelDetails(base, name, "", checkpoint.name, checkpoint.sha256)
                    yield _card(checkpoint_alias(checkpoint.name), details, checkpoint.create_time)

    async def _checkpoints(self, project: str) -> list[Checkpoint]:
        """A project's checkpoints; none while the trainer is away, which serving does without, too."""
        runs, turns = self._desk.client.runs, asyncio.Semaphore(_AT_ONCE)

        async def of(run: str) -> list[Checkpoint]:
            async with turns:
                return [checkpoint async for checkpoint in runs.checkpoints(run, page_size=1000)]

        try:
            found = [run.name async for run in runs.list(project, page_size=1000)]
            lists = await asyncio.gather(*(of(run) for run in found))
        except Unavailable as error:
            _log.warning("the trainer does not say which adapters there are", project=project, error=error.message)
            return []
        return [checkpoint for each in lists for checkpoint in each]


def _card(id: str, details: ModelDetails, created: Timestamp | None = None) -> ModelCard:
    return ModelCard(id, "model", created.seconds if created else 0, "codegraft", details)
