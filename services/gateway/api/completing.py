"""/v1/completions, /v1/fim/completions and /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Protocol

import orjson
from starlette.requests import Request
from starlette.responses import Response

from codegraft.inference.v1 import completion_pb2 as pb
from services.client import Piece
from services.core.errors import CodegraftError
from services.gateway.api import desk
from services.gateway.api.asks import Ask, ChatAsk, CompletionAsk, FimAsk
from services.gateway.api.chat import ChatShape
from services.gateway.api.desk import Desk
from services.gateway.api.generation import Generation, Part
from services.gateway.api.models import alias
from services.gateway.api.text import TextShape
from services.gateway.edge import problems
from services.gateway.edge.attending import DONE, EventStream, attended, event

_ROLES = {
    "system": pb.CHAT_ROLE_SYSTEM,
    "developer": pb.CHAT_ROLE_SYSTEM,
    "user": pb.CHAT_ROLE_USER,
    "assistant": pb.CHAT_ROLE_ASSISTANT,
}


class Shape(Protocol):
    """How one API writes an answer."""

    def whole(self, parts: Sequence[Part]) -> object: ...
    def opening(self) -> Iterator[object]: ...
    def chunks(self, piece: Piece, part: Part) -> Iterator[object]: ...
    def usage(self, parts: Sequence[Part]) -> object: ...


class Completing:
    """The three operations that generate text in OpenAI's way."""

    def __init__(self, at: Desk) -> None:
        self._desk = at

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        ask = await self._desk.read(request, CompletionAsk)
        ask.refuse_unsupported()
        before = ask.before()
        generation = await self._complete(request, ask, before, ask.suffix, ask.path, ask.logprobs)
        shape = TextShape(generation, ask.model, int(time.time()), with_logprobs=ask.logprobs is not None)
        return await _respond(request, ask, generation, shape)

    async def fim(self, request: Request) -> Response:
        """POST /v1/fim/completions"""
        ask = await self._desk.read(request, FimAsk)
        ask.refuse_unsupported()
        generation = await self._complete(request, ask, ask.prompt, ask.suffix, ask.path, None)
        shape = ChatShape(generation, ask.model, int(time.time()), with_logprobs=False, count=ask.n or 1)
        return await _respond(request, ask, generation, shape)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        ask = await self._desk.read(request, ChatAsk)
        ask.refuse_unsupported()
        target = await self._desk.target(request, ask.model)
        ask.model = ask.model or alias(target.project)
        stream = self._desk.client.completions.chat(
            target.project,
            [pb.ChatMessage(role=_ROLES[message.role], content=message.text()) for message in ask.messages],
            max_tokens=ask.most_tokens(),
            stop=ask.stops(),
            sampling=ask.sampling((ask.top_logprobs or 0) if ask.logprobs else None),
            adapter=target.adapter,
        )
        generation = await attended(request.receive, Generation.begun(stream))
        shape = ChatShape(generation, ask.model, int(time.time()), with_logprobs=bool(ask.logprobs), count=ask.n or 1)
        return await _respond(request, ask, generation, shape)

    async def _complete(
        self, request: Request, ask: Ask, prefix: str, suffix: str | None, path: str | None, logprobs: int | None
    ) -> Generation:
        target = await self._desk.target(request, ask.model)
        ask.model = ask.model or alias(target.project)
        stream = self._desk.client.completions.complete(
            target.project,
            prefix=prefix,
            suffix=suffix or "",
            path=path or "",
            max_tokens=ask.most_tokens(),
            stop=ask.stops(),
            sampling=ask.sampling(logprobs),
            adapter=target.adapter,
            session=desk.session(request, ask.user),
        )
        return await attended(request.receive, Generation.begun(stream))


async def _respond(request: Request, ask: Ask, generation: Generation, shape: Shape) -> Response:
    if ask.stream:
        with_usage = bool(ask.stream_options and ask.stream_options.include_usage)
        return EventStream(_events(generation, shape, with_usage), generation.headers)
    parts = await attended(request.receive, generation.parts())
    return desk.answer(shape.whole(parts), generation.headers)


async def _events(generation: Generation, shape: Shape, with_usage: bool) -> AsyncGenerator[bytes, None]:
    parts: dict[int, Part] = {}
    try:
        for chunk in shape.opening():
            yield event(orjson.dumps(chunk))
        async with aclosing(generation.pieces()) as pieces:
            async for piece in pieces:
                part = parts.setdefault(piece.index, Part(piece.index))
                part.take(piece)
                for chunk in shape.chunks(piece, part):
                    yield event(orjson.dumps(chunk))
        if with_usage:
            yield event(orjson.dumps(shape.usage([*parts.values()])))
    except CodegraftError as error:  # the head with its 200 is gone already: OpenAI's clients look for this
        yield event(orjson.dumps(problems.problem(error)))
    yield DONE
