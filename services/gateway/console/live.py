"""Live parts of pages: server-sent events made of the services' Watch streams.

``part``    HTML that takes the place of the element with the same id
``points``  JSON for a chart; has an id, from which a browser goes on after an outage (Last-Event-ID)
``end``     nothing more will come
``failed``  nothing more will come, and why
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Generic, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from services.core.errors import CodegraftError, Unavailable
from services.core.rpc import context
from services.gateway.edge.attending import LEAVING, EventStream

T = TypeVar("T")

_LINES = re.compile(r"\r\n|\r|\n")
"""The ends of lines in an event stream; Python knows more of them, which may stand within JSON."""

_RETRY = b"retry: 2000\n\n"
"""Milliseconds after which a browser comes back."""
STILL_HERE = b": still here\n\n"
"""A comment: keeps proxies from closing the connection, and shows us one that is dead."""
IDLE = 15.0
"""Seconds without a message after which that is sent."""
PAUSE = 0.2
"""Seconds in which messages are collected: a screen needs no more than five pictures a second."""
_WAITING = 1000
"""Messages that wait for a browser that reads slowly."""
END = b"event: end\ndata:\n\n"


def message(kind: str, data: str, position: int | None = None) -> bytes:
    """One event, of one or more lines."""
    head = f"id: {position}\n" if position is not None else ""
    lines = "".join(f"data: {line}\n" for line in _LINES.split(data))
    return f"{head}event: {kind}\n{lines}\n".encode()


def last_position(request: Request) -> int:
    """Up to where the browser has the story; 0 at first. It says so itself after an outage, and static/live.js when its
    tab is looked at again."""
    given = request.headers.get("last-event-id", "") or request.query_params.get("after", "")
    return int(given) if given.isdecimal() and len(given) < 19 else 0


def answer(request: Request, events: AsyncGenerator[bytes, None]) -> Response:
    """The response; it lasts as long as browser and gateway stay and the service has something to tell."""
    context.set_deadline(None)
    return EventStream(_told(events, request.scope.get(LEAVING) or asyncio.Event()), {})


async def _told(events: AsyncGenerator[bytes, None], leaving: asyncio.Event) -> AsyncGenerator[bytes, None]:
    """With errors told as events, except outages and our own end: browsers come back by themselves."""
    yield _RETRY
    left = asyncio.ensure_future(leaving.wait())
    following: asyncio.Task[bytes | None] | None = None
    try:
        while True:
            following = asyncio.create_task(_next(events))
            await asyncio.wait((following, left), return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                return
            event = following.result()
            if event is None:
                break
            yield event
        yield END
    except Unavailable:
        return
    except CodegraftError as error:
        yield message("failed", f"{error.message}. {error.hint}" if error.hint else error.message)
    finally:
        left.cancel()
        if following is not None and not following.done():
            following.cancel()
            await asyncio.wait((following,))
        await events.aclose()


async def _next(events: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(events, None)


class _Ended:
    """What a stream leaves in the queue at its end."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error


class Merged(Generic[T]):
    """Several streams as one: what came meanwhile, in pieces.

    Args:
        streams: they end when this does.
    """

    def __init__(self, streams: Sequence[AsyncIterator[T]]) -> None:
        self._streams = streams
        self._queue: asyncio.Queue[T | _Ended] = asyncio.Queue(_WAITING)

    async def batches(self) -> AsyncGenerator[list[T], None]:
        """Messages in the order in which they came; an empty list after :data:`IDLE` seconds without.

        Raises:
            CodegraftError: one of the streams failed.
        """
        tasks = [asyncio.create_task(self._pass_on(stream)) for stream in self._streams]
        running = len(tasks)
        try:
            while running:
                try:
                    async with asyncio.timeout(IDLE):
                        found = [await self._queue.get()]
                except TimeoutError:
                    yield []
                    continue
                await asyncio.sleep(PAUSE)
                while not self._queue.empty():
                    found.append(self._queue.get_nowait())
                ended = [each for each in found if isinstance(each, _Ended)]
                running -= len(ended)
                if messages := [each for each in found if not isinstance(each, _Ended)]:
                    yield messages
                for each in ended:
                    if each.error is not None:
                        raise each.error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pass_on(self, stream: AsyncIterator[T]) -> None:
        try:
            async for each in stream:
                await self._queue.put(each)
        except Exception as error:
            await self._queue.put(_Ended(error))
        else:
            await self._queue.put(_Ended())
