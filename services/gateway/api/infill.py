"""/infill, as llama.cpp's server has it and its editor plugins (llama.vscode, llama.vim) call it.

https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md#post-infill-for-code-infilling
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import orjson
from starlette.requests import Request
from starlette.responses import Response

from codegraft.inference.v1.completion_pb2 import ContextChunk, Sampling, Started
from services.client import Piece
from services.core.errors import CodegraftError
from services.gateway.api import desk
from services.gateway.api.asks import InfillAsk
from services.gateway.api.desk import Desk
from services.gateway.api.generation import Generation, Part
from services.gateway.api.infill_answer import InfillAnswer, InfillChunk, chosen
from services.gateway.api.models import alias
from services.gateway.api.window import steady
from services.gateway.edge import problems
from services.gateway.edge.attending import EventStream, attended, event

_DEFAULT_TOKENS, _MOST_TOKENS = 128, 4096


class Infilling:
    """The operation."""

    def __init__(self, at: Desk) -> None:
        self._desk = at

    async def infill(self, request: Request) -> Response:
        """POST /infill"""
        ask = await self._desk.read(request, InfillAsk)
        target = await self._desk.target(request, ask.model or "")
        model = ask.model or alias(target.project)
        above = steady(ask.input_prefix)
        prefix = above + ask.prompt
        if ask.n_predict == 0 or not (prefix or ask.input_suffix):
            # llama.vscode warms a cache so. There is none to warm, but a caller without rights should learn of it.
            async for _ in self._desk.client.completions.models():
                pass
            nothing = InfillAnswer.of(ask, model, Started(), "", Part(0), 0.0)
            return desk.answer(chosen(nothing, ask.response_fields))
        stream = self._desk.client.completions.complete(
            target.project,
            prefix=prefix,
            suffix=ask.input_suffix,
            context=[ContextChunk(path=chunk.filename, text=chunk.text) for chunk in reversed(ask.input_extra)],
            max_tokens=_DEFAULT_TOKENS if ask.n_predict < 0 else min(ask.n_predict, _MOST_TOKENS),
            stop=ask.stop or (),
            sampling=_sampling(ask),
            adapter=target.adapter,
            session=desk.session(request),
        )
        generation = await attended(request.receive, Generation.begun(stream))
        generation.started.prompt_truncated |= above != ask.input_prefix
        if ask.stream:
            return EventStream(_events(generation, ask, model), generation.headers)
        part = await attended(request.receive, _whole(generation, ask, model))
        return desk.answer(chosen(part, ask.response_fields), generation.headers)


def _sampling(ask: InfillAsk) -> Sampling:
    if not ask.temperature or ask.temperature < 0:
        return Sampling()
    seed = None if ask.seed == -1 else ask.seed
    return Sampling(temperature=ask.temperature, top_p=ask.top_p, top_k=ask.top_k, min_p=ask.min_p, seed=seed)


async def _limited(pieces: AsyncIterator[Piece], milliseconds: int) -> AsyncIterator[Piece]:
    """The pieces until so long after the first token, but not before there is a whole line."""
    first, has_line = 0.0, False
    async for piece in pieces:
        yield piece
        if piece.text:
            first, has_line = first or time.monotonic(), has_line or "\n" in piece.text
        if milliseconds > 0 and has_line and (time.monotonic() - first) * 1000 > milliseconds:
            return


async def _whole(generation: Generation, ask: InfillAsk, model: str) -> InfillAnswer:
    began, part = time.monotonic(), Part(0)
    async with aclosing(generation.pieces()) as pieces:
        async for piece in _limited(pieces, ask.t_max_predict_ms):
            part.take(piece)
    seconds = time.monotonic() - began
    return InfillAnswer.of(ask, model, generation.started, generation.fingerprint, part, seconds)


async def _events(generation: Generation, ask: InfillAsk, model: str) -> AsyncGenerator[bytes, None]:
    """llama.cpp's stream: chunks of text, then the whole answer without it. It has no [DONE]."""
    began, part = time.monotonic(), Part(0)
    try:
        async with aclosing(generation.pieces()) as pieces:
            async for piece in _limited(pieces, ask.t_max_predict_ms):
                part.take(piece)
                if piece.text:
                    yield event(orjson.dumps(InfillChunk(piece.text, part.tokens, generation.started.prompt_tokens)))
        seconds = time.monotonic() - began
        answer = InfillAnswer.of(ask, model, generation.started, generation.fingerprint, part, seconds)
        yield event(orjson.dumps(chosen(answer.without_text(), ask.response_fields)))
    except CodegraftError as error:
        yield event(orjson.dumps(problems.problem(error)))
