"""Subscriptions that are known to run: what is published before one does is missed by it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import nats.js.errors

from services.core.events import Event, EventBus
from services.core.events.nats import STREAM, NatsBus


async def first_of(bus: EventBus, events: AsyncIterator[Event]) -> asyncio.Future[Event]:
    """The next event of a subscription that is new; returns once it hears everything from now on."""
    known = await _consumers(bus)
    first = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)  # in memory it runs at once
    if isinstance(bus, NatsBus):
        async with asyncio.timeout(20):
            while not await _consumers(bus) - known:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    return first


async def _consumers(bus: EventBus) -> set[str]:
    """Names of those that the server has."""
    if isinstance(bus, NatsBus):
        with contextlib.suppress(nats.js.errors.NotFoundError):  # the stream is made at its first use
            return {info.name for info in await bus._connection.js.consumers_info(STREAM)}
    return set()
