"""A job queue in memory, for unit tests and single-process use."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import dataclass, field
from datetime import timedelta

from services.core.jobs.queue import ACK_WAIT
from services.core.telemetry import tracing


@dataclass
class _Item:
    kind: str
    name: str
    visible_at: float
    """Event loop time from which it may be handed out."""
    order: int
    traceparent: str
    attempts: int = 0


class MemoryQueue:
    """See :class:`~services.core.jobs.queue.JobQueue`. Belongs to one event loop."""

    def __init__(self, ack_wait: timedelta = ACK_WAIT) -> None:
        self.ack_wait = ack_wait
        self.dead: list[tuple[str, str, str]] = []
        """Dead letters: kind, name and why."""
        self._items: dict[tuple[str, str], _Item] = {}
        self._order = itertools.count()
        self._changed = asyncio.Event()

    async def submit(self, kind: str, name: str) -> None:
        if (kind, name) not in self._items:
            self._items[kind, name] = _Item(kind, name, _now(), next(self._order), tracing.traceparent())
            self._wake()

    async def take(self, kind: str, timeout: float) -> MemoryDelivery | None:  # noqa: ASYNC109
        deadline = _now() + timeout
        while True:
            changed = self._changed
            items = sorted((item for item in self._items.values() if item.kind == kind), key=lambda item: item.order)
            for item in items:
                if item.visible_at <= _now():
                    item.attempts += 1
                    item.visible_at = _now() + self.ack_wait.total_seconds()
                    return MemoryDelivery(self, item)
            if _now() >= deadline:
                return None
            until = min([deadline, *(item.visible_at for item in items)])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await changed.wait()

    def remove(self, item: _Item) -> None:
        if self._items.get((item.kind, item.name)) is item:
            del self._items[item.kind, item.name]

    def hide(self, item: _Item, seconds: float) -> None:
        """Hands the item out again only after so long."""
        item.visible_at = _now() + seconds
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()  # who waits holds the old one, so that no wake-up is lost


@dataclass
class MemoryDelivery:
    """See :class:`~services.core.jobs.queue.Delivery`."""

    _queue: MemoryQueue
    _item: _Item
    attempt: int = field(init=False)

    def __post_init__(self) -> None:
        self.attempt = self._item.attempts

    @property
    def name(self) -> str:
        return self._item.name

    @property
    def traceparent(self) -> str:
        return self._item.traceparent

    async def ack(self) -> None:
        self._queue.remove(self._item)

    async def nak(self, delay: float = 0) -> None:
        self._queue.hide(self._item, delay)

    async def in_progress(self) -> None:
        self._queue.hide(self._item, self._queue.ack_wait.total_seconds())

    async def dead_letter(self, why: str) -> None:
        self._queue.dead.append((self._item.kind, self._item.name, why))
        self._queue.remove(self._item)


def _now() -> float:
    return asyncio.get_running_loop().time()
