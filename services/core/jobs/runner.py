"""The worker's side of jobs: claim by compare-and-set, heartbeat, fence, retry, bury, reconcile.

The job's own status decides who owns it; the queue only says where to look. So a lost, repeated or late message can
delay a job, but not run it twice at once with both results counting, nor lose it.

    message -> claim (epoch + 1) -> handler, with heartbeats -> outcome in the status -> message acknowledged

Leases compare the clocks of workers: keep them within a second or so of each other.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Generic, NoReturn, TypeVar

from google.protobuf.message import Message
from opentelemetry.trace import SpanKind

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
from services.core import disk, log
from services.core.backoff import Backoff
from services.core.errors import Code, CodegraftError, InternalError, InvalidTransition, JobCancelled, LeaseLost
from services.core.jobs.context import JobContext
from services.core.jobs.queue import Delivery, JobQueue
from services.core.jobs.states import advance, claim, lease_expired, lease_left, renew, status_of
from services.core.state.table import Table
from services.core.telemetry import figures, tracing

TAKE_SECONDS = 5.0
SHUTDOWN_SECONDS = 5.0
"""How long a handler may take to notice that its worker shuts down, and then how long giving the job back may take."""

logger = log.get(__name__)
M = TypeVar("M", bound=Message)


class JobRunner(Generic[M]):
    """Works on jobs of one kind, one at a time. More runners, in any number of processes, work on more.

    How an attempt ends decides what becomes of the job:

    - the handler returns: SUCCEEDED;
    - it raises JobCancelled, or anything after a cancellation was asked for: CANCELLED;
    - it raises JobCancelled after a pause was asked for: PAUSED, or QUEUED when it was resumed meanwhile. That does not
      count as an attempt, and the handler has kept what the next one needs to go on;
    - it raises a CodegraftError that is the caller's fault: FAILED with its reason, without another attempt;
    - it raises anything else: back to QUEUED, and at the last attempt FAILED and a dead letter;
    - the worker vanishes: when the lease has expired another worker claims the job, and that counts as an attempt;
    - the worker shuts down (:meth:`run` is cancelled): back to QUEUED, and that does not.

    Args:
        kind: the queue's name for these jobs.
        table: the jobs; every record of it is a job of this kind.
        handler: does the work. It must not block the event loop for longer than a third of the lease.
        worker_id: unique among all workers; shown in the job's status.
        lease: how long a silent worker keeps its job.
        max_attempts: starts after which a job that keeps failing is given up.
        retry: waits between attempts.
    """

    def __init__(
        self,
        kind: str,
        table: Table[M],
        queue: JobQueue,
        handler: Callable[[JobContext[M]], Awaitable[None]],
        *,
        worker_id: str,
        lease: timedelta = timedelta(seconds=30),
        max_attempts: int = 3,
        retry: Backoff = Backoff(first=timedelta(seconds=4), longest=timedelta(minutes=1)),  # noqa: B008  frozen
    ) -> None:
        self.kind = kind
        self.worker_id = worker_id
        self.job = ""
        """Name of the one at hand."""
        self._table = table
        self._queue = queue
        self._handler = handler
        self._lease = lease
        self._max_attempts = max_attempts
        self._retry = retry
        figures.DEAD.labels(kind)  # there from the start: of a figure that appears with 1, Prometheus sees no increase

    async def run(self) -> NoReturn:
        """Takes jobs until it is cancelled; outages of NATS are logged and waited for."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._for_ever(self._reconcile))
            tasks.create_task(self._for_ever(self._take))
        raise AssertionError("both tasks run for ever")

    async def _for_ever(self, step: Callable[[], Awaitable[None]]) -> None:
        waits = Backoff(longest=timedelta(seconds=15))
        failures = 0
        while True:
            try:
                await step()
                failures = 0
            except Exception as error:
                unexpected = not isinstance(error, CodegraftError)
                logger.warning("the worker stumbled", kind=self.kind, error=str(error), exc_info=unexpected)
                await asyncio.sleep(waits.delay(failures))
                failures += 1

    async def _reconcile(self) -> None:
        """Queues jobs that wait without a message: submission failed, or the queue or a worker was lost."""
        for job in await self._table.all():
            status = status_of(job)
            if status.state == JOB_STATE_QUEUED or lease_expired(status):
                await self._queue.submit(self.kind, _name(job))
        await asyncio.sleep(self._lease.total_seconds() * random.uniform(0.75, 1.25))

    async def _take(self) -> None:
        delivery = await self._queue.take(self.kind, TAKE_SECONDS)
        if delivery is None:
            return
        with log.bound(job=delivery.name):
            job = await self._claim(delivery)
            if job is not None:
                self.job = delivery.name
                try:
                    await self._traced(JobContext(self._table, job, delivery.name), delivery)
                finally:
                    self.job = ""

    async def _traced(self, context: JobContext[M], delivery: Delivery) -> None:
        began = time.monotonic()
        about: tracing.Attributes = {"codegraft.job": context.name, "codegraft.epoch": context.epoch}
        try:
            with tracing.span(self.kind, SpanKind.CONSUMER, delivery.traceparent, about):
                await self._attempt(context, delivery)
        finally:
            figures.ATTEMPT_SECONDS.labels(self.kind, context.outcome).observe(time.monotonic() - began)

    # --- claiming ---------------------------------------------------------------------------------------------------

    async def _claim(self, delivery: Delivery) -> M | None:
        """The job, now ours; None when there is nothing to do, and then the message is dealt with."""
        try:
            job = await self._table.mutate(delivery.name, lambda job: self._claim_status(status_of(job)))
        except InvalidTransition:  # it has ended, or another worker is at it
            found = await self._table.find(delivery.name)
            if found is not None and status_of(found).state == JOB_STATE_RUNNING:
                await delivery.nak(max(0.0, lease_left(status_of(found)).total_seconds()) + random.uniform(0.0, 0.5))
            else:
                await self._acknowledge(delivery)
            return None
        except CodegraftError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            await delivery.ack()  # it was deleted
            return None
        status = status_of(job)
        if status.state == JOB_STATE_RUNNING:
            logger.info("job started", kind=self.kind, epoch=status.epoch, attempt=status.attempt)
            return job
        if status.state == JOB_STATE_FAILED:
            logger.error("job given up", kind=self.kind, why=status.failure.message)
            await self._bury(delivery, status.failure.message)
        else:
            await self._acknowledge(delivery)
        return None

    async def _bury(self, delivery: Delivery, why: str) -> None:
        await delivery.dead_letter(why)
        figures.DEAD.labels(self.kind).inc()

    async def _acknowledge(self, delivery: Delivery) -> None:
        """Takes the message of a job that needs no worker off the queue. A job that was resumed at that very moment
        could not be queued beside it."""
        await delivery.ack()
        found = await self._table.find(delivery.name)
        if found is not None and status_of(found).state == JOB_STATE_QUEUED:
            await self._queue.submit(self.kind, delivery.name)

    def _claim_status(self, status: JobStatus) -> None:
        waiting = status.state == JOB_STATE_QUEUED or lease_expired(status)
        if waiting and status.cancel_requested:
            advance(status, JOB_STATE_CANCELLED)
        elif waiting and status.pause_requested:
            advance(status, JOB_STATE_PAUSED)
        elif lease_expired(status) and status.attempt >= self._max_attempts:
            # Out of memory, most likely: nothing else ends a worker so that it cannot say why.
            _fail(status, InternalError(f"its worker vanished {status.attempt} times", hint="See the workers' logs."))
        else:
            claim(status, self.worker_id, self._lease)

    # --- one attempt ------------------------------------------------------------------------------------------------

    async def _attempt(self, context: JobContext[M], delivery: Delivery) -> None:
        handler = asyncio.ensure_future(self._handler(context))
        companions = [
            asyncio.create_task(self._heartbeat(context, delivery)),
            asyncio.create_task(self._follow(context)),
            asyncio.create_task(self._insist(context, handler)),
        ]
        stopping: asyncio.CancelledError | None = None
        try:
            await asyncio.wait({handler})
        except asyncio.CancelledError as error:
            stopping = error
            context.cancelled.set()
            handler.cancel()
            await asyncio.wait({handler}, timeout=SHUTDOWN_SECONDS)
        finally:
            for companion in companions:
                companion.cancel()
            await asyncio.gather(*companions, return_exceptions=True)
        if stopping is None:
            await self._finish(context, delivery, _error(handler))
            return
        try:
            async with asyncio.timeout(SHUTDOWN_SECONDS):
                if handler.done() and not handler.cancelled() and handler.exception() is None:
                    await self._finish(context, delivery, None)
                else:
                    await self._give_back(context, delivery)
        except (CodegraftError, TimeoutError) as error:
            logger.warning("the job could not be given back; its lease will expire", error=str(error))
        raise stopping

    async def _heartbeat(self, context: JobContext[M], delivery: Delivery) -> None:
        while True:
            await asyncio.sleep(self._lease.total_seconds() / 3)
            try:
                await context.update(lambda job: renew(status_of(job), self._lease))
                await delivery.in_progress()
            except LeaseLost:
                return
            except CodegraftError as error:
                logger.warning("a heartbeat failed", error=str(error))

    async def _follow(self, context: JobContext[M]) -> None:
        """Learns at once what the next heartbeat would learn, too: a cancellation, a pause, or that the job is lost."""
        try:
            async for job in self._table.watch(context.name):
                status = status_of(job)
                ended = status.epoch == context.epoch and status.state != JOB_STATE_RUNNING
                if ended or status.epoch > context.epoch:
                    break
                context.heed(status)
            context.lose()
        except CodegraftError as error:
            logger.warning("a job cannot be watched", error=str(error))

    async def _insist(self, context: JobContext[M], handler: asyncio.Future[None]) -> None:
        """Interrupts a handler that does not stop by itself."""
        await context.cancelled.wait()
        await asyncio.sleep(0 if context.lost else self._lease.total_seconds())
        while not handler.done():
            handler.cancel()
            await asyncio.sleep(self._lease.total_seconds())  # it may have swallowed that one

    # --- outcomes ---------------------------------------------------------------------------------------------------

    async def _finish(self, context: JobContext[M], delivery: Delivery, error: BaseException | None) -> None:
        if context.lost:
            # The message is the new owner's by now: an acknowledgement from here would take it away.
            logger.warning("the job was lost to another worker", epoch=context.epoch)
            return
        try:
            job = await context.update(lambda job: self._conclude(status_of(job), error, context.pausing))
        except LeaseLost:
            logger.warning("the job was lost to another worker", epoch=context.epoch)
            return
        status = status_of(job)
        state = JobState.Name(status.state)
        context.outcome = state.removeprefix("JOB_STATE_")
        if error is not None:
            tracing.failed(error)
        if error is None:
            logger.info("job ended", state=state, attempt=status.attempt)
        else:
            unexpected = None if isinstance(error, CodegraftError | asyncio.CancelledError) else error
            logger.warning("attempt ended", state=state, attempt=status.attempt, error=str(error), exc_info=unexpected)
        if status.state == JOB_STATE_QUEUED:
            await delivery.nak(0.0 if context.pausing else self._retry.delay(status.attempt - 1))
        elif status.state == JOB_STATE_FAILED and not _is_callers_fault(error):
            await self._bury(delivery, f"{status.failure.reason}: {status.failure.message}")
        else:
            await self._acknowledge(delivery)

    def _conclude(self, status: JobStatus, error: BaseException | None, pausing: bool) -> None:
        if error is None:
            advance(status, JOB_STATE_SUCCEEDED)
        elif pausing and not status.cancel_requested and isinstance(error, JobCancelled | asyncio.CancelledError):
            advance(status, JOB_STATE_PAUSED if status.pause_requested else JOB_STATE_QUEUED)
            status.attempt -= 1  # a pause must not use up the attempts
        elif status.cancel_requested or isinstance(error, JobCancelled):
            advance(status, JOB_STATE_CANCELLED)
        elif _is_callers_fault(error) or status.attempt >= self._max_attempts:
            _fail(status, error)
        else:
            advance(status, JOB_STATE_PAUSED if status.pause_requested else JOB_STATE_QUEUED)

    async def _give_back(self, context: JobContext[M], delivery: Delivery) -> None:
        def requeue(job: M) -> None:
            status = status_of(job)
            if status.cancel_requested:
                advance(status, JOB_STATE_CANCELLED)
            else:
                advance(status, JOB_STATE_PAUSED if status.pause_requested else JOB_STATE_QUEUED)
                status.attempt -= 1  # a rolling update must not use up the attempts

        if not context.lost:
            await context.update(requeue)
            context.outcome = "QUEUED"
            await delivery.nak()
            logger.info("job given back at shutdown", kind=self.kind, epoch=context.epoch)


def _error(handler: asyncio.Future[None]) -> BaseException | None:
    if handler.cancelled():
        return asyncio.CancelledError()
    error = handler.exception()
    return error and (disk.full(error) or error)


def _is_callers_fault(error: BaseException | None) -> bool:
    return isinstance(error, CodegraftError) and error.is_callers_fault


def _fail(status: JobStatus, error: BaseException) -> None:
    advance(status, JOB_STATE_FAILED)
    if not isinstance(error, CodegraftError):
        # The text of an unforeseen error may hold paths or data: it is in the log, not in the record.
        error = InternalError(f"an unexpected error ended it ({type(error).__name__})", hint="See the workers' logs.")
    status.failure.reason, status.failure.message, status.failure.hint = error.reason, error.message, error.hint


def _name(job: Message) -> str:
    return str(job.name)  # type: ignore[attr-defined]
