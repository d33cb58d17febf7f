"""An event bus in memory, for unit tests."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from datetime import UTC, datetime

from google.protobuf.message import Message

from services.core import log
from services.core.events.bus import Event, check_type
from services.core.telemetry import tracing


class MemoryBus:
    """See :class:`~services.core.events.bus.EventBus`. Belongs to one event loop.

    Args:
        source: names the publisher in every event.
    """

    def __init__(self, source: str = "codegraft") -> None:
        self._source = source
        self.published: list[Event] = []
        """Every event so far, for assertions."""
        self._ids: set[str] = set()
        self._durables: dict[str, _Durable] = {}
        self._grown = asyncio.Condition()

    async def publish(self, type: str, subject: str, data: Message, *, id: str) -> None:
        event = Event(
            id=id,
            type=check_type(type),
            source=self._source,
            subject=subject,
            time=datetime.now(UTC),
            data=data.SerializeToString(),
            request_id=log.request_id(),
            traceparent=tracing.traceparent(),
        )
        if id not in self._ids:
            self._ids.add(id)
            self.published.append(event)
            async with self._grown:
                self._grown.notify_all()

    async def subscribe(self, *types: str, durable: str = "") -> AsyncIterator[Event]:
        wanted = {check_type(type) for type in types}
        start = 0 if durable else len(self.published)
        place = self._durables.setdefault(durable, _Durable()) if durable else _Durable(start)
        while True:
            position = await self._take(place)
            event = self.published[position]
            if wanted and event.type not in wanted:
                continue
            try:
                yield event
            except GeneratorExit:
                place.returned.append(position)  # not acknowledged: the next subscriber of this name gets it
                raise

    async def _take(self, place: _Durable) -> int:
        if place.returned:
            return place.returned.popleft()
        async with self._grown:
            await self._grown.wait_for(lambda: place.next < len(self.published))
        place.next += 1
        return place.next - 1


class _Durable:
    """How far the subscribers of one name are."""

    def __init__(self, start: int = 0) -> None:
        self.next = start
        self.returned: deque[int] = deque()
