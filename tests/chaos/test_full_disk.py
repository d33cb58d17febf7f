"""A full disk is told as one, with its folder and what to do; with room again all goes on, and nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os

import pytest

from codegraft.common.v1.job_pb2 import JOB_STATE_SUCCEEDED
from codegraft.common.v1.split_pb2 import SPLIT_TEST
from codegraft.ingest.v1.source_pb2 import FileSource, Source
from services.client import retry
from services.client.aio.client import AsyncCodegraft
from services.core.errors import DiskFull, StoreUnavailable
from tests.chaos.audit import Auditor
from tests.chaos.ledger import Job, Ledger
from tests.chaos.load import QUICK, Person
from tests.chaos.stack import WholeStack

MB = 1 << 20


async def test_the_services_disk(stack: WholeStack, client: AsyncCodegraft) -> None:
    ledger = Ledger()
    person = Person.new(client, ledger)
    project = await person.create(f"{person.name}-disk")
    await person.add(project, "code")
    await person.add(project, "test", SPLIT_TEST)
    await person.follow(await person.scan(project, await person.snapshot(project)))
    await person.add(project, "more")
    snapshot = await person.snapshot(project)
    content = os.urandom(MB)
    with stack.data.filled():
        with pytest.raises(DiskFull, match=str(stack.data.folder)) as caught:
            await client.sources.upload(project, content)
        assert "Free some space" in caught.value.hint
        source = FileSource(upload=next(iter(ledger.uploads)), path="again.py")
        refused = await client.sources.add(project, Source(file=source), source_id="refused")
        with pytest.raises(DiskFull, match=str(stack.data.folder)):
            await client.sources.wait(refused.name)
        jobs = [await person.scan(project, snapshot), await person.train(project, QUICK)]
        for job in jobs:
            await until_told(stack, job)
    await client.sources.upload(project, content)
    await client.sources.sync(refused.name)
    await client.sources.wait(refused.name)
    for job in jobs:
        await person.follow(job)
        assert job.status.state == JOB_STATE_SUCCEEDED, job.status.failure
    async with Auditor.of(stack, client, ledger) as auditor:
        await auditor.all()


async def until_told(stack: WholeStack, job: Job) -> None:
    """Until its worker has logged that an attempt at the job met the full disk."""
    said = f"the disk of {stack.data.folder}"
    async with asyncio.timeout(60):
        while True:
            if any(job.name in line and said in line for line in stack.log(job.worker).splitlines()):
                return
            await asyncio.sleep(0.1)


async def test_the_object_stores_disk(
    stack: WholeStack, client: AsyncCodegraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "ATTEMPTS", 1)  # what it says the first time is what counts
    ledger = Ledger()
    person = Person.new(client, ledger)
    project = await person.create(f"{person.name}-store")
    await person.add(project, "before")
    content = os.urandom(MB)
    with stack.s3.filled():
        # Without the right to mount both are on one disk: then ingest finds no room for it first.
        apart = stack.s3.folder.stat().st_dev != stack.data.folder.stat().st_dev
        with pytest.raises(StoreUnavailable if apart else DiskFull) as caught:
            await client.sources.upload(project, content)
        assert "disk" in caught.value.hint, (caught.value.message, caught.value.hint)
        assert [each async for each in client.sources.list(project)], "what needs no store goes on"
    await until_it_takes(client, project, content)
    await person.add(project, "after")
    await person.snapshot(project)
    async with Auditor.of(stack, client, ledger) as auditor:
        await auditor.all()


async def until_it_takes(client: AsyncCodegraft, project: str, content: bytes) -> None:
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(StoreUnavailable, DiskFull):
                await client.sources.upload(project, content)
                return
            await asyncio.sleep(0.2)
