"""Workers say that they are there, idle ones too; those that are silent are not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from codegraft.access.v1.worker_pb2 import Worker
from codegraft.trainer.v1.run_pb2 import Run
from services.core.errors import NotFound, RunNotFound
from services.core.jobs import JobContext, JobRunner, MemoryQueue, new_status, workers
from services.core.jobs.workers import Workers
from services.core.state import MemoryState, Table

RUN = "projects/p/runs/r"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_LOOK", 0.01)


@asynccontextmanager
async def running(*work: asyncio.Task[None]) -> AsyncIterator[None]:
    yield
    for task in work:
        task.cancel()
    await asyncio.gather(*work, return_exceptions=True)


async def until(workers: Workers, wanted: Callable[[list[Worker]], bool]) -> list[Worker]:
    async with asyncio.timeout(5):
        while True:
            found, _ = await workers.page(0, "")
            if wanted(found):
                return found
            await asyncio.sleep(0.01)


async def test_a_worker_is_there_from_its_start_to_its_end_and_tells_its_job() -> None:
    state, runs, queue, done = (
        MemoryState(),
        Table(MemoryState(), Run, missing=RunNotFound),
        MemoryQueue(),
        asyncio.Event(),
    )

    async def handler(context: JobContext[Run]) -> None:
        await done.wait()

    runner = JobRunner("run", runs, queue, handler, worker_id="host-1-0")
    here, elsewhere = (Workers(state, its, timedelta(seconds=30)) for its in ([runner], []))
    async with running(asyncio.create_task(runner.run()), asyncio.create_task(here.run())):
        (idle,) = await until(elsewhere, bool)
        assert (idle.name, idle.kind, idle.job) == ("workers/host-1-0", "run", "")
        await runs.create(Run(name=RUN, status=new_status()))
        await queue.submit("run", RUN)
        (busy,) = await until(elsewhere, lambda found: bool(found[0].job))
        assert busy.job == RUN and busy.create_time == idle.create_time
        done.set()
        await until(elsewhere, lambda found: not found[0].job)
    assert (await elsewhere.page(0, ""))[0] == [], "whoever ends says so"


async def test_one_that_was_killed_is_gone_with_its_lease_and_one_that_works_stays() -> None:
    state = MemoryState()
    table = Table(state, Worker, missing=NotFound)
    killed = Worker(name="workers/killed", kind="run")
    killed.seen_time.FromNanoseconds(time.time_ns() + 10**9)  # or it were gone before anybody could look
    await table.create(killed)
    runner = JobRunner("run", Table(state, Run, missing=RunNotFound), MemoryQueue(), None, worker_id="w")  # type: ignore[arg-type]
    these = Workers(state, [runner], timedelta(seconds=0.3))
    async with running(asyncio.create_task(these.run())):
        await until(these, lambda found: len(found) == 2)
        await until(these, lambda found: [worker.name for worker in found] == ["workers/w"])
        async with asyncio.timeout(5):
            while [worker.name for worker in await table.all()] != ["workers/w"]:  # noqa: ASYNC110  # nor its record
                await asyncio.sleep(0.01)
