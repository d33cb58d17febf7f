"""A worker that stands still until its lease is over is fenced off: its successor's result stands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from codegraft.common.v1.job_pb2 import JOB_STATE_SUCCEEDED, JobStatus
from codegraft.common.v1.split_pb2 import SPLIT_TEST
from codegraft.scanner.v1.scan_pb2 import Scan
from services.client.aio.client import AsyncCodegraft
from services.core.errors import ScanNotFound
from services.core.jobs import is_final
from services.core.state import Table
from services.trainer.records import Tables
from tests.chaos.audit import Auditor
from tests.chaos.ledger import Job, Ledger
from tests.chaos.load import QUICK, Person
from tests.chaos.stack import REPLICAS, WholeStack

STARTED = "job started"
LOST = "the job was lost to another worker"
LONG = QUICK | {"train_steps": 60, "checkpoint_steps": 4, "eval_steps": 20}


@pytest.fixture
async def auditor(stack: WholeStack, client: AsyncCodegraft) -> AsyncIterator[Auditor]:
    async with Auditor.of(stack, client, Ledger()) as made:
        yield made


async def until(table: Table[Any], job: Job, reached: Callable[[JobStatus], bool]) -> Any:
    """The job's record once it is so, as NATS has it: who is paused answers nobody."""
    async with asyncio.timeout(90):
        async for record in table.watch(job.name):
            job.see(record.status)
            if reached(record.status):
                return record
    raise AssertionError("unreachable")


async def said(stack: WholeStack, service: str, event: str, job: str) -> None:
    """Returns once a service has logged the event of the job."""
    async with asyncio.timeout(30):
        while not any(event in line and job in line for line in stack.log(service).splitlines()):  # noqa: ASYNC110  another process's
            await asyncio.sleep(0.02)


async def paused(stack: WholeStack, service: str, table: Table[Any], job: Job) -> bool:
    """Whether the worker stands still now, with the job at hand: it may have been done before."""
    stack.pause(service)
    await asyncio.sleep(0.3)  # what it has sent before has arrived
    if not is_final((await table.get(job.name)).status):
        return True
    stack.wake(service)
    return False


async def test_a_worker_that_wakes_too_late_changes_nothing(
    stack: WholeStack, client: AsyncCodegraft, auditor: Auditor
) -> None:
    scans = Table(auditor.runtime.state("scanner"), Scan, missing=ScanNotFound)
    runs = Tables.of(auditor.runtime.state("trainer")).runs
    person = Person.new(client, auditor.ledger)
    project = await person.create(f"{person.name}-paused")
    await person.add(project, "code")
    await person.add(project, "test", SPLIT_TEST)
    await person.follow(await person.scan(project, await person.snapshot(project)))
    for number in range(2):  # enough for a second scan to be under way for a while
        await person.add(project, f"more-{number}")
    snapshot = await person.snapshot(project)
    for _ in range(4):
        run = await person.train(project, LONG)
        begun = await until(runs, run, lambda status: is_final(status) or status.progress.done >= 4)
        if await paused(stack, "trainer", runs, run):
            break
    try:
        for _ in range(4):
            scan = await person.scan(project, snapshot)
            await said(stack, "scanner", STARTED, scan.name)  # NATS knows before the worker does, who would not miss it
            if await paused(stack, "scanner", scans, scan):
                break
        for replica in REPLICAS:
            await asyncio.to_thread(stack.begin, replica)
        scanned = await until(scans, scan, is_final)
        trained = await until(runs, run, is_final)
    finally:
        stack.wake("scanner")
        stack.wake("trainer")
    assert scanned.status.state == trained.status.state == JOB_STATE_SUCCEEDED, (scanned.status, trained.status)
    assert trained.status.epoch == begun.status.epoch + 1, "its successor did it, and nobody else"
    assert scanned.status.epoch == 2, "likewise"

    for name, job in (("scanner", scan), ("trainer", run)):
        await said(stack, name, LOST, job.name)
    assert await scans.get(scan.name) == scanned and await runs.get(run.name) == trained
    for replica in REPLICAS:
        await asyncio.to_thread(stack.kill, replica)
    await auditor.all()
