"""Jobs in parts: every part once, whoever makes it; over the fake queue and over JetStream."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from services.core import errors
from services.core.backoff import Backoff
from services.core.jobs import JobQueue, MemoryQueue
from services.core.jobs import parts as module
from services.core.jobs.nats import NatsQueue
from services.core.jobs.parts import Make, PartRunner, Parts, parse_part, part_name
from services.core.nats_connection import connect
from services.core.store import MemoryStore

if TYPE_CHECKING:
    from tests.conftest import NatsServer

JOB = "projects/p/scans/s"
ACK_WAIT = timedelta(seconds=3)
"""Longer than the machine stands still, so that nothing is made twice. Who is cancelled while it tells of a failure
leaves its message to whoever comes after so long."""
RETRY = Backoff(first=timedelta(milliseconds=20), longest=timedelta(milliseconds=50))


class Desk:
    def __init__(self, queue: JobQueue) -> None:
        self.queue, self.store, self.kind = queue, MemoryStore(), f"k{uuid.uuid4().hex}"
        self.made: Counter[str] = Counter()

    async def make(self, name: str) -> bytes | None:
        self.made[name] += 1
        await asyncio.sleep(0.01)
        return name.encode()

    def parts(self) -> Parts:
        return Parts(self.store, self.queue, self.kind, JOB)

    @contextlib.asynccontextmanager
    async def working(self, *makes: Make) -> AsyncIterator[list[asyncio.Task[None]]]:
        tasks: list[asyncio.Task[None]] = [
            asyncio.create_task(PartRunner(self.kind, self.store, self.queue, make, retry=RETRY).run())
            for make in makes or (self.make,)
        ]
        try:
            yield tasks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def run(self, count: int = 12) -> list[int]:
        async with asyncio.timeout(20):
            return [index async for index in self.parts().run("phase", count, lambda: False) if index is not None]


@pytest.fixture(params=["memory", "nats"])
async def desk(request: pytest.FixtureRequest) -> AsyncIterator[Desk]:
    if request.param == "memory":
        yield Desk(MemoryQueue(ack_wait=ACK_WAIT))
        return
    server: NatsServer = request.getfixturevalue("nats_server")
    connection = await connect(server.url, user=server.user, password=server.password)
    yield Desk(NatsQueue(connection, ack_wait=ACK_WAIT))
    await connection.close()


def test_names_are_parsed_back() -> None:
    assert parse_part(part_name(JOB, "examine", 7)) == (JOB, "examine", 7)


async def test_every_part_is_made_once_by_whoever_is_free(desk: Desk) -> None:
    async with desk.working(desk.make, desk.make, desk.make):
        assert sorted(await desk.run()) == list(range(12))
        assert set(desk.made.values()) == {1} and len(desk.made) == 12
        assert await desk.parts().result("phase", 3) == part_name(JOB, "phase", 3).encode()
        assert sorted(await desk.run()) == list(range(12)), "another attempt finds them"
        assert set(desk.made.values()) == {1}
    await desk.parts().clear()
    assert not desk.store.data


async def test_a_message_that_comes_again_changes_nothing(desk: Desk) -> None:
    async with desk.working():
        await desk.run(3)
        for index in range(3):
            await desk.queue.submit(desk.kind, part_name(JOB, "phase", index))
        await asyncio.sleep(0.3)
    assert set(desk.made.values()) == {1}


async def test_what_a_lost_worker_had_is_made_by_another(desk: Desk) -> None:
    stuck = asyncio.Event()

    async def never(name: str) -> bytes | None:
        stuck.set()
        await asyncio.Event().wait()
        return b""

    running = asyncio.create_task(desk.run(4))
    async with desk.working(never):
        await stuck.wait()
    async with desk.working():
        assert sorted(await running) == [0, 1, 2, 3]


async def test_parts_of_a_lost_queue_are_submitted_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESUBMIT_SECONDS", 0.3)
    running = asyncio.create_task(desk.run(3))
    await asyncio.sleep(0.1)
    for _ in range(3):
        delivery = await desk.queue.take(desk.kind, 5)
        assert delivery is not None
        await delivery.ack()
    async with desk.working():
        assert sorted(await running) == [0, 1, 2]


@pytest.mark.parametrize(
    ("error", "tries", "raised"),
    [
        (errors.ModelNotFound("no model", hint="get one"), 1, errors.ModelNotFound),
        (errors.StoreUnavailable("away"), 3, errors.StoreUnavailable),
        (ValueError("/secret/path"), 3, errors.InternalError),
    ],
)
async def test_a_part_that_cannot_be_made_ends_the_job_with_its_reason(
    desk: Desk, error: Exception, tries: int, raised: type[errors.CodegraftError]
) -> None:
    async def fail(name: str) -> bytes | None:
        desk.made[name] += 1
        if name.endswith("1"):
            raise error
        return b""

    async with desk.working(fail):
        with pytest.raises(raised) as told:
            await desk.run(3)
    assert "/secret" not in told.value.message
    assert desk.made[part_name(JOB, "phase", 1)] == tries
    async with desk.working():
        assert sorted(await desk.run(3)) == [0, 1, 2], "another attempt tries anew"


async def test_a_cancelled_job_waits_for_nothing(desk: Desk) -> None:
    with pytest.raises(errors.JobCancelled):
        async for _ in desk.parts().run("phase", 3, lambda: True):
            pass


async def test_a_part_that_nobody_wants_is_taken_off_the_queue(desk: Desk) -> None:
    async def unwanted(name: str) -> bytes | None:
        desk.made[name] += 1
        return None

    async def until_made(times: int) -> None:
        async with asyncio.timeout(20):
            while desk.made.total() < times:
                await desk.queue.submit(desk.kind, name)  # refused as long as its message is there
                await asyncio.sleep(0.02)

    name = part_name(JOB, "phase", 0)
    await desk.queue.submit(desk.kind, name)
    async with desk.working(unwanted):
        async with asyncio.timeout(20):
            while not desk.made:  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)
        assert desk.made == {name: 1}, "it was given back"
        await until_made(2)
    assert not desk.store.data
