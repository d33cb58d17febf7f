"""From the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.core import log
from services.inference.adapters.registry import Pin
from services.inference.engine.sequence import Output

_log = log.get("inference.inbox")


class Inbox:
    """What the sequences of one answer deliver, on its way from the engine's thread to the event loop.

    The version is released with the last sequence's end, whether anybody still listens or not.
    """

    def __init__(self, count: int, pin: Pin) -> None:
        self.pin = pin
        self.awaited = set(range(count))
        """Those whose end was not received yet."""
        self._running = set(range(count))
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()

    def door(self, index: int) -> Callable[[Output], None]:
        """Where that sequence delivers."""

        def deliver(output: Output) -> None:
            if output.reason is not None:
                self._running.discard(index)
                if not self._running:
                    self.pin.release()
            try:
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, output))
            except RuntimeError:  # the loop is closed: nobody listens any more
                _log.debug("an output came after the end of the loop")

        return deliver

    async def get(self) -> tuple[int, Output]:
        """The next output, and whose."""
        index, output = await self._queue.get()
        if output.reason is not None:
            self.awaited.discard(index)
        return index, output
