"""A full disk is told as one, with its folder and what to do; with room again all goes on, and nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os

import pytest

from codegraft.common.v1.job_pb2 import JOB_STATE_SUCCEEDED
from services.client import retry
from services.client.aio.client import AsyncCodegraft
from services.core.errors import DiskFull, StoreUnavailable
from tests.chaos.audit import Auditor
from tests.chaos.ledger import Ledger
from tests.chaos.load import Person
from tests.chaos.stack import WholeStack

MB = 1 << 20


async def test_the_services_disk(stack: WholeStack, client: AsyncCodegraft) -> None:
    ledger = Ledger()
    person = Person.new(client, ledger)
    project = await person.create(f"{person.name}-disk")
    await person.add(project, "code")
    snapshot = await person.snapshot(project)
    content = os.urandom(MB)
    with stack.data.filled():
        with pytest.raises(DiskFull, match=str(stack.data.folder)) as caught:
            await client.sources.upload(project, content)
        assert "Free some space" in caught.value.hint
        scan = await person.scan(project, snapshot)
        await until_told(stack, "scanner", scan.name)
    await client.sources.upload(project, content)
    await person.follow(scan)
    assert scan.status.state == JOB_STATE_SUCCEEDED, scan.status.failure
    async with Auditor.of(stack, client, ledger) as auditor:
        await auditor.all()


async def until_told(stack: WholeStack, service: str, job: str) -> None:
    """Until a service has logged that an attempt at the job met the full disk."""
    async with asyncio.timeout(60):
        while not any(  # noqa: ASYNC110  of another process
            job in line and f"the disk of {stack.data.folder}" in line for line in stack.log(service).splitlines()
        ):
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
        with pytest.raises(StoreUnavailable) as caught:
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
            with contextlib.suppress(StoreUnavailable):
                await client.sources.upload(project, content)
                return
            await asyncio.sleep(0.2)
