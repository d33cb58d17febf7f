"""Clients that go away: what is done for them stops at once, and with it the call that it waits for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

LEAVING = "codegraft.leaving"
"""Key of a request's scope: an asyncio.Event that is set once the server is about to stop. Streams without an end of
their own end with it; they would hold it up."""


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def attended(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work, which is cancelled when the client goes away.

    Args:
        receive: of a request whose body was read.

    Raises:
        ClientGone: it did.
    """
    task, absence = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, absence), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        absence.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, sent as they come.

    Args:
        events: complete events, see :func:`event`; closed at the end, however it comes.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        self._events = events
        self.status_code = 200
        self.background = None
        # A proxy that collects the answer before it passes it on (nginx) would take its point away.
        self.init_headers({**headers, "content-type": "text/event-stream; charset=utf-8", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the end, or until the client goes away."""

        async def pump() -> None:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await attended(receive, pump())
        finally:
            await self._events.aclose()


def event(data: bytes) -> bytes:
    """One event."""
    return b"data: " + data + b"\n\n"


DONE = event(b"[DONE]")
"""How OpenAI's streams end."""
