"""A full disk is told as one, with its folder and what to do; with room again all goes on, and nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nats.js.errors import ServiceUnavailableError

from codegraft.common.v1.job_pb2 import JOB_STATE_SUCCEEDED
from codegraft.common.v1.split_pb2 import SPLIT_TEST
from codegraft.ingest.v1.source_pb2 import FileSource, Source
from services.client import retry
from services.client.aio.client import AsyncCodegraft
from services.core import nats_connection
from services.core.errors import DiskFull, ResourceExists, StateUnavailable, StoreUnavailable
from services.core.runtime import connect_nats
from services.core.state.nats import NatsState
from tests.chaos.audit import Auditor
from tests.chaos.disk import SmallDisk
from tests.chaos.ledger import Job, Ledger
from tests.chaos.load import QUICK, Person
from tests.chaos.stack import LEASE, NATS_ROOM, WholeStack
from tests.conftest import NatsServer

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


# --- NATS ---


async def test_nats_has_no_room(stack: WholeStack, client: AsyncCodegraft, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger()
    person = Person.new(client, ledger)
    project = await person.create(f"{person.name}-nats")
    await person.add(project, "code")
    await person.add(project, "test", SPLIT_TEST)
    scan = await person.scan(project, await person.snapshot(project))
    async with no_room(stack):
        with monkeypatch.context() as first:
            first.setattr(retry, "ATTEMPTS", 1)  # what it says the first time is what counts
            with pytest.raises(StateUnavailable, match="no room left") as caught:
                await client.projects.create(f"{person.name}-refused")
        assert "disk-full.md" in caught.value.hint
        assert [each.name async for each in client.sources.list(project)] == list(ledger.sources), "it is read from"
        async for _ in client.completions.complete(project, prefix="a", max_tokens=2):
            pass
        await asyncio.sleep(LEASE)  # the scan's worker cannot say that it is alive
    await person.create(f"{person.name}-refused")
    await person.follow(scan)
    assert scan.status.state == JOB_STATE_SUCCEEDED, scan.status.failure
    await person.follow(await person.train(project, QUICK))
    async with Auditor.of(stack, client, ledger) as auditor:
        await auditor.all()


@contextlib.asynccontextmanager
async def no_room(stack: WholeStack) -> AsyncIterator[None]:
    """JetStream has taken all that it may of its disk, until the end of the block."""
    connection = await connect_nats("ballast", stack.admin(stack.folder.root))
    await connection.js.add_stream(name="BALLAST", subjects=["ballast"])
    try:
        with pytest.raises(ServiceUnavailableError):
            for _ in range(2 * NATS_ROOM // (MB // 2)):
                await connection.js.publish("ballast", bytes(MB // 2))
        yield
    finally:
        await connection.js.delete_stream("BALLAST")
        await connection.close()


async def test_the_disk_of_nats_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where JetStream's own bound is not below the disk's size. It is silent then, and stays so until a restart."""
    with SmallDisk.of(tmp_path / "disk", 48 * MB) as disk:
        server = NatsServer(disk.folder)
        server.start()
        connection = await nats_connection.connect(server.url, user=server.user, password=server.password)
        try:
            state = NatsState(connection, "records")
            acknowledged = {f"r{number}" for number in range(20)}
            for key in acknowledged:
                await state.create(key, bytes(1000))
            with disk.filled(), monkeypatch.context() as hasty:
                hasty.setattr(connection.js, "_timeout", 1.0)
                for number in range(2):
                    with pytest.raises(StateUnavailable, match="no answer in time") as caught:
                        await state.create(f"refused{number}", bytes(20_000))
                    assert "its disk" in caught.value.hint and "restarted" in caught.value.hint
                hasty.undo()
                assert await state.get("r1") is not None, "it is read from"
            server.stop()
            server.start()
            async with asyncio.timeout(60):
                while True:
                    with contextlib.suppress(StateUnavailable):
                        with contextlib.suppress(ResourceExists):  # its answer came too late
                            await state.create("after", b"")
                        break
            assert acknowledged <= {entry.key for entry in await state.list()}
        finally:
            await connection.close()
            server.stop()


async def until_it_takes(client: AsyncCodegraft, project: str, content: bytes) -> None:
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(StoreUnavailable, DiskFull):
                await client.sources.upload(project, content)
                return
            await asyncio.sleep(0.2)
