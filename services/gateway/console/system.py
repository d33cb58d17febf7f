"""The system: health of the services, jobs that wait or run and where, what the replica holds, the audit log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from starlette.responses import Response
from starlette.routing import Route

from codegraft.common.v1.job_pb2 import JobState, JobStatus
from codegraft.ingest.v1.project_pb2 import Project
from services.client.aio.caller import new_request_id
from services.client.jobs import FINAL
from services.core import names
from services.gateway.console import auditing, live
from services.gateway.console.visit import House, Visit, first, if_there
from services.gateway.upstream import HealthOfAll

T = TypeVar("T")

_PROJECTS = 20
"""Whose jobs are looked for, by name; each costs two calls."""
_JOBS = 50
"""Newest runs, and newest scans, of each."""
_REFRESH = 5.0
"""Seconds between two looks at the services' health."""
_RECORDS = 200


def routes(house: House) -> list[Route]:
    """All of them."""
    system = System(house)
    return [
        house.route("/system", system.show),
        house.route("/system/live", system.follow),
        house.route("/system/audit", audit),
    ]


@dataclass(frozen=True, slots=True)
class Job:
    """A scan or a run that has not ended."""

    name: str
    status: JobStatus

    @property
    def way(self) -> str:
        """Where its page is, below the project's."""
        ids = self.name.split("/")
        return f"training/{ids[3]}" if ids[2] == "runs" else f"dataset?scan={ids[3]}"


class System:
    """The page."""

    def __init__(self, house: House) -> None:
        self._health = HealthOfAll(house.settings)

    async def show(self, visit: Visit) -> Response:
        """GET /console/system"""
        client = visit.client
        health, caller, jobs, adapters, keys = await asyncio.gather(
            self._health.ask(),
            if_there(client.keys.whoami()),
            if_there(_all_jobs(visit)),
            if_there(_all(client.serving.adapters())),
            if_there(_all(client.keys.list())),
        )
        projects = await if_there(first(client.projects.list(), _PROJECTS))
        return visit.page(
            "system.html",
            health=health,
            caller=caller,
            jobs=jobs,
            adapters=adapters,
            keys=keys,
            projects=[names.parse(names.PROJECT, each.name)["project"] for each in projects or ()],
            request_id=new_request_id(),
        )

    async def follow(self, visit: Visit) -> Response:
        """GET /console/system/live: health, anew every few seconds. Its Watch would tell of no service that hangs."""

        async def events() -> AsyncGenerator[bytes, None]:
            while True:
                yield live.message("part", visit.part("parts/health.html", health=await self._health.ask()))
                await asyncio.sleep(_REFRESH)

        return live.answer(visit.request, events())


async def _all_jobs(visit: Visit) -> list[Job]:
    projects = await first(visit.client.projects.list(), _PROJECTS)
    found = await asyncio.gather(*(_jobs(visit, project) for project in projects))
    return sorted((job for jobs in found for job in jobs), key=_order)


async def _jobs(visit: Visit, project: Project) -> list[Job]:
    scans = await first(visit.client.scans.list(project.name), _JOBS)
    runs = await first(visit.client.runs.list(project.name), _JOBS)
    jobs = [*(Job(scan.name, scan.status) for scan in scans), *(Job(run.name, run.status) for run in runs)]
    return [job for job in jobs if job.status.state not in FINAL]


def _order(job: Job) -> tuple[bool, int]:
    """Those that run first, then by age: as the queues have them."""
    return job.status.state != JobState.JOB_STATE_RUNNING, job.status.create_time.ToNanoseconds()


async def _all(items: AsyncIterator[T]) -> list[T]:
    return [each async for each in items]


async def audit(visit: Visit) -> Response:
    """GET /console/system/audit?project=&days="""
    project = visit.query.text("project")
    days = min(max(visit.query.whole("days") or 1, 1), 90)
    records = await auditing.newest(visit.client.audit, project or "-", timedelta(days=days), _RECORDS)
    return visit.page("audit.html", records=records, chosen=project, days=days, most=_RECORDS)
