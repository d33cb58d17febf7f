"""The system: health of the services, jobs that wait or run, workers, what the replica holds, the audit log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from datetime import timedelta
from typing import TypeVar

from starlette.responses import Response
from starlette.routing import Route

from codegraft.access.v1.worker_pb2 import Worker
from services.client.aio.caller import new_request_id
from services.core import names
from services.gateway.console import auditing, jobs, live
from services.gateway.console.visit import House, Visit, first, if_there
from services.gateway.upstream import HealthOfAll

T = TypeVar("T")

_REFRESH = 5.0
"""Seconds between two looks at the services' health, and at the workers."""
_RECORDS = 200


def routes(house: House) -> list[Route]:
    """All of them."""
    system = System(house)
    return [
        house.route("/system", system.show),
        house.route("/system/live", system.follow),
        house.route("/system/audit", audit),
    ]


class System:
    """The page."""

    def __init__(self, house: House) -> None:
        self._health = HealthOfAll(house.settings)

    async def show(self, visit: Visit) -> Response:
        """GET /console/system"""
        client = visit.client
        health, caller, unfinished, workers, adapters, keys = await asyncio.gather(
            self._health.ask(),
            if_there(client.keys.whoami()),
            if_there(jobs.unfinished(visit)),
            _workers(visit),
            if_there(_all(client.serving.adapters())),
            if_there(_all(client.keys.list())),
        )
        projects = await if_there(first(client.projects.list(), jobs.PROJECTS))
        return visit.page(
            "system.html",
            health=health,
            caller=caller,
            jobs=unfinished,
            workers=workers,
            adapters=adapters,
            keys=keys,
            projects=[names.parse(names.PROJECT, each.name)["project"] for each in projects or ()],
            request_id=new_request_id(),
        )

    async def follow(self, visit: Visit) -> Response:
        """GET /console/system/live: health, jobs, workers. One stream, for a browser has but six connections."""

        async def events() -> AsyncGenerator[bytes, None]:
            merged = live.Merged([self._health_parts(visit), _worker_parts(visit), jobs.parts(visit)])
            async with aclosing(merged.batches()) as batches:
                async for batch in batches:
                    yield b"".join(batch) or live.STILL_HERE

        return live.answer(visit.request, events())

    async def _health_parts(self, visit: Visit) -> AsyncGenerator[bytes, None]:
        """Anew every few seconds. Its Watch would tell of no service that hangs."""
        while True:
            yield live.message("part", visit.part("parts/health.html", health=await self._health.ask()))
            await asyncio.sleep(_REFRESH)


async def _workers(visit: Visit) -> list[Worker] | None:
    return await if_there(_all(visit.client.workers.list()))


async def _worker_parts(visit: Visit) -> AsyncGenerator[bytes, None]:
    """Anew every few seconds, as they say themselves that they are there."""
    while True:
        yield live.message("part", visit.part("parts/workers.html", workers=await _workers(visit)))
        await asyncio.sleep(_REFRESH)


async def _all(items: AsyncIterator[T]) -> list[T]:
    return [each async for each in items]


async def audit(visit: Visit) -> Response:
    """GET /console/system/audit?project=&days="""
    project = visit.query.text("project")
    days = min(max(visit.query.whole("days") or 1, 1), 90)
    records = await auditing.newest(visit.client.audit, project or "-", timedelta(days=days), _RECORDS)
    return visit.page("audit.html", records=records, chosen=project, days=days, most=_RECORDS)
