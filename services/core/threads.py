"""Work in a thread that the end of the process does not wait for."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def apart(function: Callable[[], T], name: str) -> T:
    """What the function returns, run in a thread of its own.

    For what takes long, cannot be stopped, and leaves nothing behind when it ends in the middle: importing torch,
    loading a model. The event loop waits at its end for the threads of ``asyncio.to_thread``, up to ten seconds after
    SIGTERM for a service that has just been started; for this one it does not, see :func:`services.core.runtime.leave`.

    Args:
        name: of the thread, for dumps of stacks.
    """
    loop = asyncio.get_running_loop()
    told: asyncio.Future[T] = loop.create_future()

    def tell(error: BaseException | None, result: T | None) -> None:
        if told.cancelled():
            return
        if error is not None:
            told.set_exception(error)
        else:
            told.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        error, result = None, None
        try:
            result = context.run(function)
        except BaseException as failure:
            error = failure
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile, and nobody waits
            loop.call_soon_threadsafe(tell, error, result)

    context = contextvars.copy_context()
    threading.Thread(target=work, name=name, daemon=True).start()
    return await told
