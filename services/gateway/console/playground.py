"""The playground: base model and adapter complete the same text beside each other, as it is generated."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import orjson
from starlette.responses import Response
from starlette.routing import Route

from codegraft.inference.v1.completion_pb2 import AdapterChoice, FinishReason, Sampling
from services.client.pieces import Piece
from services.core import names
from services.core.errors import CodegraftError, InvalidArgument
from services.gateway.console import live, words
from services.gateway.console.serving import checkpoint_of
from services.gateway.console.visit import House, Visit
from services.gateway.edge.attending import EventStream

_TOKENS = 512
"""Most that are generated."""


def routes(house: House) -> list[Route]:
    """The one."""
    return [house.route("/p/{project}/serving/playground", complete, post=True)]


async def complete(visit: Visit) -> Response:
    """POST /console/p/acme/serving/playground: events ``started``, ``text``, then ``finished`` or ``failed``.

    The field ``version`` is "base", "policy", RUN/STEP, or RUN for its best one. A generation ends with the browser's
    interest in it.
    """
    form = visit.form
    tokens = form.whole("max_tokens") or 64
    if not 1 <= tokens <= _TOKENS:
        raise InvalidArgument("too many tokens", field="max_tokens", hint=f"Give 1 to {_TOKENS}.")
    temperature = form.number("temperature")
    stream = visit.client.completions.complete(
        visit.project,
        prefix=form.raw("prefix"),
        suffix=form.raw("suffix"),
        path=form.text("path"),
        max_tokens=tokens,
        sampling=Sampling(temperature=temperature) if temperature else None,
        adapter=await _choice(visit, form.text("version", "policy")),
    )

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            async for piece in stream:
                yield _event(piece)
        except CodegraftError as error:
            yield live.message("failed", f"{error.message}. {error.hint}" if error.hint else error.message)
        finally:
            stream.cancel()

    return EventStream(events(), {})


async def _choice(visit: Visit, version: str) -> AdapterChoice | None:
    match version:
        case "policy":
            return None
        case "base":
            return AdapterChoice(base=True)
    run, _, step = version.partition("/")
    if not step:
        return AdapterChoice(checkpoint=await checkpoint_of(visit, run, "version"))
    return AdapterChoice(checkpoint=names.build(names.CHECKPOINT, project=visit.project, run=run, step=step))


def _event(piece: Piece) -> bytes:
    if piece.started is not None:
        said = {
            "model": piece.started.model,
            "checkpoint": words.version(piece.started.checkpoint),
            "tokens": piece.started.prompt_tokens,
        }
        return live.message("started", orjson.dumps(said).decode())
    if piece.finished is not None:
        done = {
            "reason": FinishReason.Name(piece.finished.reason).removeprefix("FINISH_REASON_").lower(),
            "tokens": piece.finished.usage.completion_tokens,
            "first": piece.finished.timings.first_token_seconds,
            "seconds": piece.finished.timings.total_seconds,
        }
        return live.message("finished", orjson.dumps(done).decode())
    return live.message("text", orjson.dumps(piece.text).decode())
