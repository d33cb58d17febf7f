"""Streams in both directions: a completion that can be ended from outside its loop, an upload that can be cancelled.

Both forms are written by hand here, unlike the rest of the blocking client: this is where the two grpc libraries differ
in more than ``await``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Generic, TypeVar

import grpc

from services.core.errors import Cancelled
from services.core.rpc.client import OPTIONS
from services.core.rpc.spans import spans
from services.core.rpc.status import from_rpc

T = TypeVar("T")


class AsyncStream(AsyncIterator[T], Generic[T]):
    """Use it in ``async for``. Dropping it, or cancelling the task that reads it, cancels the call too."""

    def __init__(self, call: Any, convert: Callable[[Any], T]) -> None:
        self._call = call
        self._messages = aiter(call)
        self._convert = convert
        self._cancelled = False

    def __aiter__(self) -> AsyncStream[T]:
        return self

    async def __anext__(self) -> T:
        """The next piece.

        Raises:
            CodegraftError: the class that belongs to the error's reason.
        """
        if self._cancelled:
            raise StopAsyncIteration
        try:
            return self._convert(await anext(self._messages))
        except grpc.RpcError as failure:
            raise from_rpc(failure) from None
        except asyncio.CancelledError:
            # grpc raises this also when it is the call that was cancelled, not the task that reads it.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                self.cancel()
                raise
            if self._cancelled:
                raise StopAsyncIteration from None
            raise Cancelled("the client was closed") from None

    def cancel(self) -> None:
        """Stops the generation; the loop over the stream ends."""
        self._cancelled = True
        self._call.cancel()

    def __del__(self) -> None:
        self._call.cancel()


class Stream(Iterator[T], Generic[T]):
    """Use it in ``for``. Dropping it cancels the call too."""

    def __init__(self, call: Any, convert: Callable[[Any], T]) -> None:
        self._call = call
        self._convert = convert
        self._cancelled = False

    def __iter__(self) -> Stream[T]:
        return self

    def __next__(self) -> T:
        """The next piece.

        Raises:
            CodegraftError: the class that belongs to the error's reason.
        """
        if self._cancelled:
            raise StopIteration
        try:
            return self._convert(next(self._call))
        except grpc.RpcError as failure:
            if self._cancelled:
                raise StopIteration from None
            raise from_rpc(failure) from None

    def cancel(self) -> None:
        """Stops the generation; the loop over the stream ends. May be called from another thread."""
        self._cancelled = True
        self._call.cancel()

    def __del__(self) -> None:
        self._call.cancel()


def blocking_channel(target: str, certificates: grpc.ChannelCredentials | None) -> grpc.Channel:
    """A channel of the blocking library, in both clients: see :func:`answer_async`."""
    if certificates is None:
        return grpc.insecure_channel(target, options=OPTIONS)
    return grpc.secure_channel(target, certificates, options=OPTIONS)


def channel_async(target: str, certificates: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """A channel of the asynchronous library, which records spans where the process does."""
    if certificates is None:
        return grpc.aio.insecure_channel(target, options=OPTIONS, interceptors=spans())
    return grpc.aio.secure_channel(target, certificates, options=OPTIONS, interceptors=spans())


async def answer_async(call: Any) -> Any:
    """The response to a stream of requests that the blocking library sends in a thread of its own.

    Not grpc.aio's, for two reasons. It reads files in the event loop. And when a service refuses an upload while a
    chunk is on its way, it replaces the service's error by INTERNAL, "Internal error from Core" (1.85.1).

    Raises:
        grpc.RpcError: the call failed.
    """
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def wake(_call: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(ended.set)

    call.add_done_callback(wake)
    try:
        await ended.wait()
    except asyncio.CancelledError:
        call.cancel()
        raise
    return call.result()


def answer(call: Any) -> Any:
    """The response to a stream of requests.

    Raises:
        grpc.RpcError: the call failed.
    """
    try:
        return call.result()
    except KeyboardInterrupt:
        call.cancel()
        raise
