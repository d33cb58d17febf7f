"""From the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from services.core import log
from services.inference.adapters.registry import Pin
from services.inference.engine.sequence import Output

_log = log.get("inference.inbox")


class Post:
    """The way to one event loop for all that the engine delivers. Made within that loop.

    A step delivers to many answers at once. To wake the loop for each of them would cost the engine's thread a system
    call and the interpreter's lock every time, so it is woken once for all that came since it last looked.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._sent: deque[tuple[Inbox, int, Output]] = deque()
        self._woken = False

    def send(self, inbox: Inbox, index: int, output: Output) -> None:
        """Brings an output to its inbox soon; from any thread."""
        self._sent.append((inbox, index, output))
        if self._woken:
            return
        self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop is closed: nobody listens any more
            _log.debug("an output came after the end of the loop")

    def _deliver(self) -> None:
        self._woken = False  # first: what is sent from now on wakes the loop again
        while self._sent:
            inbox, index, output = self._sent.popleft()
            inbox.take(index, output)


class Inbox:
    """What the sequences of one answer deliver, on its way from the engine's thread to the event loop.

    The version is released with the last sequence's end, whether anybody still listens or not.
    """

    def __init__(self, count: int, pin: Pin, post: Post) -> None:
        self.pin = pin
        self.awaited = set(range(count))
        """Those whose end was not received yet."""
        self._running = set(range(count))
        self._post = post
        self._outputs: deque[tuple[int, Output]] = deque()
        self._arrived = asyncio.Event()

    def door(self, index: int) -> Callable[[Output], None]:
        """Where that sequence delivers."""

        def deliver(output: Output) -> None:
            if output.reason is not None:
                self._running.discard(index)
                if not self._running:
                    self.pin.release()
            self._post.send(self, index, output)

        return deliver

    def take(self, index: int, output: Output) -> None:
        """What the post brings."""
        self._outputs.append((index, output))
        self._arrived.set()

    async def get(self) -> tuple[int, Output]:
        """The next output, and whose. Those that wait are one: who cannot keep up gets fewer messages."""
        while not self._outputs:
            self._arrived.clear()
            await self._arrived.wait()
        index, output = self._outputs.popleft()
        while self._outputs and self._outputs[0][0] == index:
            output = output.followed_by(self._outputs.popleft()[1])
        if output.reason is not None:
            self.awaited.discard(index)
        return index, output
