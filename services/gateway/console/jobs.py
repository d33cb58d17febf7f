"""Scans and runs that wait or run, in all projects of the caller: as they are now, and as they go on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from codegraft.common.v1.job_pb2 import JobState, JobStatus
from codegraft.ingest.v1.project_pb2 import Project
from codegraft.scanner.v1.scan_pb2 import Scan
from codegraft.trainer.v1.run_pb2 import Run
from services.client.jobs import FINAL
from services.core.errors import DeadlineExceeded, Unavailable
from services.gateway.console import live
from services.gateway.console.visit import Visit, first, if_there

J = TypeVar("J", Scan, Run)

PROJECTS = 20
"""Whose jobs are looked for, by name; each costs two calls."""
_JOBS = 50
"""Newest runs, and newest scans, of each."""
_RELIST = 10.0
"""Seconds after which it is looked for new ones. To be told of them would take a stream of everything that ever was in
each of the projects."""


@dataclass(frozen=True, slots=True)
class Job:
    """A scan or a run."""

    name: str
    status: JobStatus
    told: int = 0
    """Events of a run's story that were there already."""

    @property
    def way(self) -> str:
        """Where its page is, below the project's."""
        ids = self.name.split("/")
        return f"training/{ids[3]}" if ids[2] == "runs" else f"dataset?scan={ids[3]}"


def newest_first(jobs: Iterable[J]) -> list[J]:
    """In the order of the services' lists."""
    return sorted(jobs, key=lambda job: (-job.status.create_time.ToNanoseconds(), job.name))


async def unfinished(visit: Visit) -> list[Job]:
    """Those that have not ended: first what runs, then by age, as the queues have them."""
    projects = await first(visit.client.projects.list(), PROJECTS)
    found = await asyncio.gather(*(_of(visit, project) for project in projects))
    return sorted((job for jobs in found for job in jobs), key=_order)


async def parts(visit: Visit) -> AsyncGenerator[bytes, None]:
    """Live parts: the table, after every change of one. What has ended stays until it is looked for new ones. While a
    service is away nothing comes."""
    while True:
        until = time.monotonic() + _RELIST
        found = await if_there(unfinished(visit))
        jobs = {job.name: job for job in found or ()}
        if found is not None:
            yield _table(visit, jobs)
        merged = live.Merged([_watched(visit, job) for job in jobs.values()])
        try:
            async with aclosing(merged.batches()) as batches:
                async for batch in batches:
                    if time.monotonic() > until:
                        break
                    if batch:
                        jobs.update((job.name, job) for job in batch)
                        yield _table(visit, jobs)
        except (Unavailable, DeadlineExceeded):
            pass
        await asyncio.sleep(until - time.monotonic())


def _table(visit: Visit, jobs: dict[str, Job]) -> bytes:
    return live.message("part", visit.part("parts/jobs.html", jobs=sorted(jobs.values(), key=_order)))


async def _watched(visit: Visit, job: Job) -> AsyncIterator[Job]:
    if "/runs/" in job.name:
        async for message in visit.client.runs.watch(job.name, job.told):
            yield _of_run(message.run)
    else:
        async for scan in visit.client.scans.watch(job.name):
            yield Job(scan.name, scan.status)


def _of_run(run: Run) -> Job:
    return Job(run.name, run.status, run.last_sequence)


async def _of(visit: Visit, project: Project) -> list[Job]:
    scans = await first(visit.client.scans.list(project.name), _JOBS)
    runs = await first(visit.client.runs.list(project.name), _JOBS)
    jobs = [*(Job(scan.name, scan.status) for scan in scans), *(_of_run(run) for run in runs)]
    return [job for job in jobs if job.status.state not in FINAL]


def _order(job: Job) -> tuple[bool, int]:
    return job.status.state != JobState.JOB_STATE_RUNNING, job.status.create_time.ToNanoseconds()
