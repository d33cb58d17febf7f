"""Job queues and the runner: one suite over the fake and over JetStream."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from codegraft.common.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_FAILED,
    JOB_STATE_PAUSED,
    JOB_STATE_QUEUED,
    JOB_STATE_RUNNING,
    JOB_STATE_SUCCEEDED,
    JobState,
    JobStatus,
)
from codegraft.trainer.v1.run_pb2 import Run
from services.core import errors
from services.core.backoff import Backoff
from services.core.jobs import (
    Delivery,
    JobContext,
    JobQueue,
    JobRunner,
    MemoryQueue,
    new_status,
    request_cancel,
    request_pause,
    request_resume,
)
from services.core.jobs.nats import DEAD_STREAM, STREAM, NatsQueue
from services.core.jobs.states import claim, lease_expired
from services.core.nats_connection import NatsConnection, connect
from services.core.state import MemoryState, Table
from services.core.state.nats import NatsState
from services.core.telemetry import figures, tracing

if TYPE_CHECKING:
    from tests.conftest import NatsServer

ACK_WAIT = timedelta(seconds=1)
"""Of tests that wait for it to pass. In the others a machine that stands still for so long must change nothing."""
PATIENT = timedelta(seconds=5)
LEASE = timedelta(seconds=0.9)
RETRY = Backoff(first=timedelta(milliseconds=20), longest=timedelta(milliseconds=50))
NAME = "projects/p/runs/r"

Handler = Callable[[JobContext[Run]], Awaitable[None]]


@dataclass
class World:
    """A queue and a table that no other test uses."""

    queue: JobQueue
    table: Table[Run]
    kind: str
    connection: NatsConnection | None = None

    async def dead(self) -> list[tuple[str, str]]:
        """Dead letters: name and why."""
        if isinstance(self.queue, MemoryQueue):
            return [(name, why) for kind, name, why in self.queue.dead if kind == self.kind]
        assert self.connection is not None
        info = await self.connection.js.stream_info(DEAD_STREAM, subjects_filter=f"dead.{self.kind}.>")
        letters = []
        for subject in info.state.subjects or {}:
            letter = await self.connection.js.get_last_msg(DEAD_STREAM, subject)
            letters.append(((letter.data or b"").decode(), (letter.headers or {})["Codegraft-Reason"]))
        return letters

    async def lose_messages(self) -> None:
        """The queue forgets everything."""
        if isinstance(self.queue, MemoryQueue):
            self.queue._items.clear()
        else:
            assert self.connection is not None
            await self.connection.js.purge_stream(STREAM, subject=f"jobs.{self.kind}.>")

    async def queued(self) -> bool:
        """Whether a message waits; takes nothing off."""
        if isinstance(self.queue, MemoryQueue):
            return bool(self.queue._items)
        assert self.connection is not None
        info = await self.connection.js.stream_info(STREAM, subjects_filter=f"jobs.{self.kind}.>")
        return bool(info.state.subjects)

    def runner(self, handler: Handler, worker: str = "w", **settings: object) -> JobRunner[Run]:
        return JobRunner(
            self.kind,
            self.table,
            self.queue,
            handler,
            worker_id=worker,
            **{"lease": LEASE, "retry": RETRY, **settings},  # type: ignore[arg-type]
        )

    async def drained(self) -> None:
        """Returns once no message waits. A worker that is at it has to stay until then: it acknowledges a message after
        it has written how the job ended."""
        async with asyncio.timeout(20):
            while await self.queued():  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    @contextlib.asynccontextmanager
    async def working(
        self, handler: Handler, worker: str = "w", **settings: object
    ) -> AsyncIterator[asyncio.Task[None]]:
        task: asyncio.Task[None] = asyncio.create_task(self.runner(handler, worker, **settings).run())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def create(self, name: str = NAME, submit: bool = True) -> None:
        await self.table.create(Run(name=name, status=new_status()))
        if submit:
            await self.queue.submit(self.kind, name)

    async def reaches(self, state: JobState, name: str = NAME, seconds: float = 20) -> JobStatus:
        async with asyncio.timeout(seconds):
            async for run in self.table.watch(name):
                if run.status.state == state:
                    return run.status
        raise AssertionError("deleted")


def new_world(connection: NatsConnection | None, ack_wait: timedelta) -> World:
    """In memory without a connection."""
    kind = f"k{uuid.uuid4().hex}"
    if connection is None:
        return World(MemoryQueue(ack_wait=ack_wait), Table(MemoryState(), Run, missing=errors.RunNotFound), kind)
    table = Table(NatsState(connection, kind), Run, missing=errors.RunNotFound)
    return World(NatsQueue(connection, ack_wait=ack_wait), table, kind, connection)


@pytest.fixture(params=["memory", "nats"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    if request.param == "memory":
        yield new_world(None, PATIENT)
        return
    server: NatsServer = request.getfixturevalue("nats_server")
    connection = await connect(server.url, user=server.user, password=server.password)
    yield new_world(connection, PATIENT)
    await connection.close()


@pytest.fixture
def hasty(world: World) -> World:
    """One whose silent takers lose their jobs soon."""
    return new_world(world.connection, ACK_WAIT)


async def undisturbed(hasty: World, attempt: Callable[[World], Awaitable[None]]) -> None:
    """Makes an attempt that has to be in time for leases of a second; another one where the machine stood still."""
    for _ in range(3):
        world, pauses = new_world(hasty.connection, ACK_WAIT), [0.0]
        pulse = asyncio.create_task(_beat(new_world(hasty.connection, ACK_WAIT).table, pauses))
        try:
            return await attempt(world)
        except AssertionError:
            await asyncio.sleep(0.5)  # a write that is under way may be what tells of it
            if max(pauses) < LEASE.total_seconds() / 3:
                raise
        finally:
            pulse.cancel()
            await asyncio.gather(pulse, return_exceptions=True)
    raise AssertionError(f"the machine stood still for {max(pauses):.1f} s at each attempt")


async def _beat(table: Table[Run], pauses: list[float]) -> None:
    """Notes how long each of many small writes took, this process' own pauses included."""
    clock = asyncio.get_running_loop().time
    await table.create(Run(name=NAME))
    while True:
        began = clock()
        await asyncio.sleep(0.05)
        await table.mutate(NAME, lambda run: setattr(run, "step", run.step + 1))
        pauses.append(clock() - began)


# --- the queue --------------------------------------------------------------------------------------------------------


async def taken(world: World, seconds: float = 5) -> Delivery:
    return await world.queue.take(world.kind, seconds) or pytest.fail("nothing to take")


async def test_first_in_first_out(world: World) -> None:
    for name in ("projects/p/runs/b", "projects/p/runs/a"):
        await world.queue.submit(world.kind, name)
    first, second = await taken(world), await taken(world)
    assert [first.name, second.name] == ["projects/p/runs/b", "projects/p/runs/a"]
    assert [first.attempt, second.attempt] == [1, 1]
    await first.ack()
    await second.ack()
    assert await world.queue.take(world.kind, 0.2) is None
    assert not await world.queued()


async def test_a_job_is_queued_once_until_it_is_off_the_queue(world: World) -> None:
    await world.queue.submit(world.kind, NAME)
    await world.queue.submit(world.kind, NAME)
    delivery = await taken(world)
    await world.queue.submit(world.kind, NAME)  # it is with a taker
    assert await world.queue.take(world.kind, 0.2) is None
    await delivery.ack()
    await world.queue.submit(world.kind, NAME)
    assert (await taken(world)).name == NAME


async def test_a_job_goes_on_with_the_trace_of_who_submitted_it(world: World) -> None:
    trace, seen = "ab" * 16, []
    with tracing.under(f"00-{trace}-{'cd' * 8}-01"):
        await world.create()
    await world.create("projects/p/runs/untraced")

    async def handler(context: JobContext[Run]) -> None:
        seen.append((context.name, tracing.traceparent()))

    async with world.working(handler):
        await world.reaches(JOB_STATE_SUCCEEDED)
        await world.reaches(JOB_STATE_SUCCEEDED, "projects/p/runs/untraced")
    (_, ours), (_, other) = sorted(seen)
    assert ours.split("-")[1] == trace != other.split("-")[1]
    assert ours.split("-")[2] != "cd" * 8
    assert figures.ATTEMPT_SECONDS.labels(world.kind, "SUCCEEDED")._sum.get() > 0


async def test_kinds_are_apart(world: World) -> None:
    await world.queue.submit(world.kind, NAME)
    assert await world.queue.take(world.kind + "x", 0.2) is None
    assert (await taken(world)).name == NAME


async def test_a_taker_wakes_for_a_new_job(world: World) -> None:
    taking = asyncio.create_task(world.queue.take(world.kind, 5))
    await asyncio.sleep(0.1)
    await world.queue.submit(world.kind, NAME)
    assert (await asyncio.wait_for(taking, 4) or pytest.fail("nothing")).name == NAME  # not only at the end of its time


async def test_a_silent_taker_loses_the_job(hasty: World) -> None:
    await hasty.queue.submit(hasty.kind, NAME)
    clock = asyncio.get_running_loop().time
    began = clock()
    first = await taken(hasty)
    again = await taken(hasty)
    assert clock() - began > 0.9 * ACK_WAIT.total_seconds()  # not before
    assert (again.name, again.attempt) == (NAME, 2)
    await again.ack()
    await first.in_progress()  # late: changes nothing
    assert await hasty.queue.take(hasty.kind, 0.2) is None


async def test_a_busy_taker_keeps_the_job(hasty: World) -> None:
    async def attempt(world: World) -> None:
        await world.queue.submit(world.kind, NAME)
        delivery = await taken(world)
        for _ in range(4):
            assert await world.queue.take(world.kind, 0.5) is None
            await delivery.in_progress()
        await delivery.ack()

    await undisturbed(hasty, attempt)


async def test_nak_waits(world: World) -> None:
    await world.queue.submit(world.kind, NAME)
    await (await taken(world)).nak()
    second = await taken(world)
    clock = asyncio.get_running_loop().time
    began = clock()
    await second.nak(0.6)
    again = await taken(world)
    assert clock() - began > 0.5 and again.attempt == 3
    await again.ack()


async def test_dead_letters_are_kept(world: World) -> None:
    await world.queue.submit(world.kind, NAME)
    await (await taken(world)).dead_letter("INTERNAL:\r\nno ümlaut")
    assert await world.queue.take(world.kind, 0.2) is None
    [(name, why)] = await world.dead()
    assert name == NAME
    assert why.startswith("INTERNAL:")


async def test_an_interrupted_take_leaves_the_job(world: World) -> None:
    taking = asyncio.create_task(world.queue.take(world.kind, 5))
    await asyncio.sleep(0.2)
    taking.cancel()
    await asyncio.gather(taking, return_exceptions=True)
    await world.queue.submit(world.kind, NAME)
    assert (await taken(world)).attempt == 1


# --- the runner: how an attempt ends ----------------------------------------------------------------------------------


async def test_success(world: World) -> None:
    seen: list[JobContext[Run]] = []

    async def handler(context: JobContext[Run]) -> None:
        seen.append(context)
        assert (context.name, context.epoch, context.job.status.worker) == (NAME, 1, "w")
        await context.progress(3, 4, "steps", "training")
        await context.update(lambda run: setattr(run, "step", 3))
        await context.progress(4, 4, "steps", "training")  # too soon to be written: the end carries it

    await world.create()
    async with world.working(handler):
        status = await world.reaches(JOB_STATE_SUCCEEDED)
        await world.drained()
    run = await world.table.get(NAME)
    assert (run.step, status.epoch, status.attempt, status.worker) == (3, 1, 1, "")
    assert (status.progress.done, status.progress.message) == (4, "training")
    assert not status.HasField("lease_expire_time")
    assert status.create_time.ToDatetime() <= status.start_time.ToDatetime() <= status.end_time.ToDatetime()
    with pytest.raises(errors.LeaseLost):  # it has ended
        await seen[0].update(lambda run: setattr(run, "step", 9))


async def test_the_callers_fault_fails_at_once(world: World) -> None:
    calls = 0

    async def handler(context: JobContext[Run]) -> None:
        nonlocal calls
        calls += 1
        raise errors.EmptyDataset("no file passed", hint="Loosen the filters.")

    await world.create()
    async with world.working(handler):
        status = await world.reaches(JOB_STATE_FAILED)
        await world.drained()
        await asyncio.sleep(0.3)
    assert calls == 1
    failure = status.failure
    assert (failure.reason, failure.message, failure.hint) == ("EMPTY_DATASET", "no file passed", "Loosen the filters.")
    assert await world.dead() == []


async def test_other_failures_are_retried_then_buried(world: World) -> None:
    attempts: list[int] = []

    async def handler(context: JobContext[Run]) -> None:
        attempts.append(context.job.status.attempt)
        raise RuntimeError("secret /path")

    await world.create()
    async with world.working(handler, max_attempts=3):
        status = await world.reaches(JOB_STATE_FAILED)
        await world.drained()
        await asyncio.sleep(0.3)
    assert attempts == [1, 2, 3]
    assert status.failure.reason == "INTERNAL"
    assert "RuntimeError" in status.failure.message
    assert "secret" not in status.failure.message
    [(name, why)] = await world.dead()
    assert name == NAME
    assert why.startswith("INTERNAL: ")


async def test_a_retry_can_succeed(world: World) -> None:
    async def handler(context: JobContext[Run]) -> None:
        if context.job.status.attempt == 1:
            raise errors.StoreUnavailable("try again")

    await world.create()
    async with world.working(handler):
        status = await world.reaches(JOB_STATE_SUCCEEDED)
    assert (status.attempt, status.epoch, status.HasField("failure")) == (2, 2, False)


# --- the runner: cancellation -----------------------------------------------------------------------------------------


async def test_cancelled_while_queued_never_starts(world: World) -> None:
    started = asyncio.Event()

    async def handler(context: JobContext[Run]) -> None:
        started.set()

    await world.create()
    await world.table.mutate(NAME, lambda run: request_cancel(run.status))
    async with world.working(handler):
        await world.drained()
    assert (await world.table.get(NAME)).status.state == JOB_STATE_CANCELLED
    assert not started.is_set()


async def test_cancelled_while_running(world: World) -> None:
    async def handler(context: JobContext[Run]) -> None:
        def in_a_thread() -> None:
            while not context.is_cancelled():
                stopped.wait(0.01)

        await asyncio.to_thread(in_a_thread)
        raise errors.JobCancelled("stopped")

    import threading

    stopped = threading.Event()
    await world.create()
    async with world.working(handler, lease=timedelta(minutes=3)):
        await world.reaches(JOB_STATE_RUNNING)
        await world.table.mutate(NAME, lambda run: request_cancel(run.status))
        status = await world.reaches(JOB_STATE_CANCELLED)  # not only at the next heartbeat, in a minute
        await world.drained()
    assert status.HasField("end_time")


async def test_a_paused_job_holds_no_worker_until_it_is_resumed(world: World) -> None:
    handled: list[int] = []

    async def handler(context: JobContext[Run]) -> None:
        handled.append(context.epoch)
        if (context.name, context.epoch) == (NAME, 1):
            await context.cancelled.wait()
            assert context.pausing
            raise errors.JobCancelled("stopped")

    await world.create()
    async with world.working(handler):
        await world.reaches(JOB_STATE_RUNNING)
        await world.table.mutate(NAME, lambda run: request_pause(run.status))
        status = await world.reaches(JOB_STATE_PAUSED)
        assert (status.worker, status.attempt, status.pause_requested) == ("", 0, False)
        # Another job gets the worker, and neither message nor reconciliation start the paused one.
        await world.create("projects/p/runs/next")
        await world.reaches(JOB_STATE_SUCCEEDED, "projects/p/runs/next")
        await world.queue.submit(world.kind, NAME)
        await asyncio.sleep(1.5 * LEASE.total_seconds())
        assert (await world.table.get(NAME)).status.state == JOB_STATE_PAUSED and handled == [1, 1]
        await world.table.mutate(NAME, lambda run: request_resume(run.status))
        await world.queue.submit(world.kind, NAME)
        status = await world.reaches(JOB_STATE_SUCCEEDED)
    assert (status.epoch, status.attempt) == (2, 1)


async def test_a_pause_that_is_taken_back_only_interrupts(world: World) -> None:
    async def handler(context: JobContext[Run]) -> None:
        if context.epoch == 1:
            await context.cancelled.wait()
            await world.table.mutate(NAME, lambda run: request_resume(run.status))
            raise errors.JobCancelled("stopped")

    await world.create()
    async with world.working(handler):
        await world.reaches(JOB_STATE_RUNNING)
        await world.table.mutate(NAME, lambda run: request_pause(run.status))
        status = await world.reaches(JOB_STATE_SUCCEEDED)
    assert (status.epoch, status.attempt) == (2, 1)


class ResumedAtTheLastMoment:
    """A queue whose paused job is resumed just before its old message is acknowledged."""

    def __init__(self, world: World) -> None:
        self._world, self._queue = world, world.queue

    async def submit(self, kind: str, name: str) -> None:
        await self._queue.submit(kind, name)

    async def take(self, kind: str, timeout: float) -> Any:  # noqa: ASYNC109
        delivery: Any = await self._queue.take(kind, timeout)
        if delivery is not None:
            acknowledge = delivery.ack

            async def ack() -> None:
                if (await self._world.table.get(NAME)).status.state == JOB_STATE_PAUSED:
                    await self._world.table.mutate(NAME, lambda run: request_resume(run.status))
                    await self.submit(kind, NAME)
                await acknowledge()

            delivery.ack = ack
        return delivery


async def test_a_job_resumed_while_its_worker_lets_go_is_queued_again(world: World) -> None:
    """Its message is still the old one, so that the new one is refused: the worker looks again."""

    async def handler(context: JobContext[Run]) -> None:
        if context.epoch == 1:
            await context.cancelled.wait()
            raise errors.JobCancelled("stopped")

    await world.create()
    world.queue = ResumedAtTheLastMoment(world)
    async with world.working(handler, lease=timedelta(seconds=30)):
        await world.reaches(JOB_STATE_RUNNING)
        await world.table.mutate(NAME, lambda run: request_pause(run.status))
        await world.reaches(JOB_STATE_SUCCEEDED)


async def test_a_pause_survives_a_worker_that_vanished(world: World) -> None:
    started: list[int] = []

    def vanish(run: Run) -> None:
        claim(run.status, "gone", LEASE, datetime.now(UTC) - timedelta(minutes=1))
        request_pause(run.status)

    async def handler(context: JobContext[Run]) -> None:
        started.append(context.epoch)

    await world.create()
    await world.table.mutate(NAME, vanish)
    async with world.working(handler):
        await world.reaches(JOB_STATE_PAUSED)
    assert not started


async def test_a_handler_that_does_not_listen_is_interrupted(world: World) -> None:
    async def handler(context: JobContext[Run]) -> None:
        await asyncio.sleep(60)

    await world.create()
    async with world.working(handler):
        await world.reaches(JOB_STATE_RUNNING)
        await world.table.mutate(NAME, lambda run: request_cancel(run.status))
        assert (await world.reaches(JOB_STATE_CANCELLED)).attempt == 1


async def test_a_deleted_job_is_dropped(hasty: World) -> None:
    stopped = asyncio.Event()

    async def handler(context: JobContext[Run]) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    await hasty.create()
    async with hasty.working(handler):
        await hasty.reaches(JOB_STATE_RUNNING)
        while await hasty.table.find(NAME) is not None:
            with contextlib.suppress(errors.EtagMismatch):  # of a heartbeat that came in between
                await hasty.table.delete(NAME)
        await asyncio.wait_for(stopped.wait(), 20)
        await hasty.drained()
    assert await hasty.table.find(NAME) is None


# --- the runner: leases -----------------------------------------------------------------------------------------------


async def test_a_long_job_keeps_its_lease_and_its_message(hasty: World) -> None:
    """Longer than lease and ack wait, with others that would take it."""

    async def attempt(world: World) -> None:
        starts: list[str] = []

        async def handler(context: JobContext[Run]) -> None:
            starts.append(context.job.status.worker)
            await asyncio.sleep(2.5)

        await world.create()
        async with world.working(handler, "a"):
            await world.reaches(JOB_STATE_RUNNING)
            assert await world.queue.take(world.kind, 2) is None
            assert not lease_expired((await world.table.get(NAME)).status)
            async with world.working(handler, "b"):
                status = await world.reaches(JOB_STATE_SUCCEEDED)
        assert (len(starts), status.epoch) == (1, 1)

    await undisturbed(hasty, attempt)


async def test_a_lost_workers_job_goes_to_another_and_the_late_one_is_fenced(hasty: World) -> None:
    world = hasty

    async def handler(context: JobContext[Run]) -> None:
        await context.update(lambda run: setattr(run, "title", "second"))

    await world.create()
    delivery = await taken(world)  # a worker that claims the job, then hangs without a sign of life
    job = await world.table.mutate(NAME, lambda run: claim(run.status, "hung", LEASE))
    late = JobContext(world.table, job, NAME)
    async with world.working(handler, "second"):
        status = await world.reaches(JOB_STATE_SUCCEEDED)
    assert (status.epoch, status.attempt) == (2, 2)
    with pytest.raises(errors.LeaseLost):
        await late.update(lambda run: setattr(run, "title", "late"))
    with pytest.raises(errors.LeaseLost):
        await late.progress(1, 2, "steps")
    assert late.is_cancelled()
    await delivery.ack()  # counts for nothing
    assert (await world.table.get(NAME)).title == "second"


async def test_a_running_handler_is_stopped_when_the_epoch_moves_on(world: World) -> None:
    stopped = asyncio.Event()

    async def handler(context: JobContext[Run]) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    def take_over(run: Run) -> None:
        run.status.epoch += 1
        run.status.worker = "other"
        run.status.lease_expire_time.FromDatetime(datetime.now(UTC) + timedelta(minutes=1))

    await world.create()
    async with world.working(handler, lease=timedelta(minutes=3)):
        await world.reaches(JOB_STATE_RUNNING)
        await world.table.mutate(NAME, take_over)
        await asyncio.wait_for(stopped.wait(), 20)  # the next heartbeat is in a minute
    status = (await world.table.get(NAME)).status
    assert (status.state, status.epoch, status.worker) == (JOB_STATE_RUNNING, 2, "other")  # left alone


async def test_workers_that_vanish_use_up_the_attempts(world: World) -> None:
    def vanish(run: Run) -> None:
        claim(run.status, "gone", timedelta(seconds=-1))
        run.status.attempt = 3

    async def handler(context: JobContext[Run]) -> None:
        raise AssertionError("never started again")

    await world.create(submit=False)
    await world.table.mutate(NAME, vanish)
    async with world.working(handler, max_attempts=3):
        status = await world.reaches(JOB_STATE_FAILED)
        async with asyncio.timeout(20):
            while not await world.dead():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    assert "vanished 3 times" in status.failure.message


async def test_lost_messages_are_reconciled(world: World) -> None:
    async def handler(context: JobContext[Run]) -> None:
        pass

    await world.create("projects/p/runs/never-submitted", submit=False)
    await world.create("projects/p/runs/lost")
    await world.create("projects/p/runs/orphan")
    await world.lose_messages()
    orphan = "projects/p/runs/orphan"
    await world.table.mutate(orphan, lambda run: claim(run.status, "gone", timedelta(seconds=0.5)))
    async with world.working(handler):
        for name in ("never-submitted", "lost", "orphan"):
            await world.reaches(JOB_STATE_SUCCEEDED, f"projects/p/runs/{name}")
    assert (await world.table.get(orphan)).status.epoch == 2


async def test_shutdown_gives_the_job_back(world: World) -> None:
    started = asyncio.Event()

    async def handler(context: JobContext[Run]) -> None:
        started.set()
        await asyncio.sleep(60)

    async def quick(context: JobContext[Run]) -> None:
        pass

    await world.create()
    async with world.working(handler, lease=timedelta(seconds=30)):
        await asyncio.wait_for(started.wait(), 20)
    status = (await world.table.get(NAME)).status
    assert (status.state, status.attempt, status.worker) == (JOB_STATE_QUEUED, 0, "")
    async with world.working(quick, "next"):
        status = await world.reaches(JOB_STATE_SUCCEEDED)
    assert (status.epoch, status.attempt) == (2, 1)


async def test_more_workers_take_more_jobs(world: World) -> None:
    async def handler(context: JobContext[Run]) -> None:
        await asyncio.sleep(0.3)

    names = [f"projects/p/runs/r{number}" for number in range(6)]
    for name in names:
        await world.create(name)
    async with contextlib.AsyncExitStack() as workers:
        for number in range(3):
            await workers.enter_async_context(world.working(handler, f"w{number}"))
        for name in names:
            assert (await world.reaches(JOB_STATE_SUCCEEDED, name)).epoch == 1


# --- the real server only ---------------------------------------------------------------------------------------------

WORKER = """
import asyncio, sys
from services.core import errors
from services.core.jobs import JobRunner
from services.core.jobs.nats import NatsQueue
from services.core.nats_connection import connect
from services.core.state import Table
from services.core.state.nats import NatsState
from services.core.telemetry import figures, tracing
from codegraft.trainer.v1.run_pb2 import Run
from datetime import timedelta

async def main(url, user, password, kind):
    connection = await connect(url, user=user, password=password)
    async def handler(context):
        await context.update(lambda run: setattr(run, "step", 7))
        await asyncio.sleep(60)
    table = Table(NatsState(connection, kind), Run, missing=errors.RunNotFound)
    queue = NatsQueue(connection, ack_wait=timedelta(seconds=1))
    await JobRunner(kind, table, queue, handler, worker_id="doomed", lease=timedelta(seconds=0.9)).run()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("world", ["nats"], indirect=True)
async def test_the_job_of_a_killed_process_goes_on_elsewhere(hasty: World, nats_server: NatsServer) -> None:
    world = hasty

    async def handler(context: JobContext[Run]) -> None:
        assert context.job.step == 7  # what the dead worker had reached
        await context.update(lambda run: setattr(run, "step", 8))

    await world.create()
    arguments = [nats_server.url, nats_server.user, nats_server.password, world.kind]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WORKER, *arguments, cwd=Path(__file__).parents[2]
    )
    try:
        async with asyncio.timeout(60):
            async for run in world.table.watch(NAME):
                if run.step == 7:
                    break
        os.kill(process.pid, signal.SIGKILL)
        async with world.working(handler, "rescuer"):
            status = await world.reaches(JOB_STATE_SUCCEEDED)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    assert (status.epoch, status.attempt, (await world.table.get(NAME)).step) == (2, 2, 8)


async def test_what_waits_is_counted_before_there_is_any_worker(nats_server: NatsServer) -> None:
    """What scales workers from none asks the consumer that workers would share."""
    connection = await connect(nats_server.url, user=nats_server.user, password=nats_server.password)
    queue, kind = NatsQueue(connection), uuid.uuid4().hex
    await queue.submit(kind, "projects/p/jobs/one")
    await queue.submit(kind, "projects/p/jobs/two")
    assert (await connection.js.consumer_info(STREAM, f"workers-{kind}")).num_pending == 2
    await connection.close()


async def test_jobs_go_on_over_a_restart_of_the_server(own_nats_server: NatsServer) -> None:
    connection = await connect(own_nats_server.url, user=own_nats_server.user, password=own_nats_server.password)
    table = Table(NatsState(connection, "jobs"), Run, missing=errors.RunNotFound)
    world = World(NatsQueue(connection, ack_wait=ACK_WAIT), table, "run", connection)
    go_on = asyncio.Event()

    async def handler(context: JobContext[Run]) -> None:
        await context.update(lambda run: setattr(run, "step", 1))
        if context.name == NAME:
            await go_on.wait()
        await context.update(lambda run: setattr(run, "step", 2))

    async with world.working(handler):
        await world.create()
        await world.reaches(JOB_STATE_RUNNING)
        own_nats_server.stop()
        await asyncio.sleep(1.2)  # longer than the lease
        go_on.set()
        await asyncio.sleep(0.2)
        own_nats_server.start()
        status = await world.reaches(JOB_STATE_SUCCEEDED, seconds=20)
        assert (status.epoch, status.attempt) == (1, 1)  # the outage cost no attempt
        await world.create("projects/p/runs/next")
        await world.reaches(JOB_STATE_SUCCEEDED, "projects/p/runs/next", seconds=20)
    await connection.close()
