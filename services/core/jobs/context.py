"""What a job's handler sees: the job, fenced updates, progress with an honest ETA, and the wish that it should stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Generic, TypeVar

from google.protobuf.message import Message

from codegraft.common.v1.job_pb2 import JOB_STATE_RUNNING, JobStatus, Progress
from services.core import log
from services.core.backoff import Backoff
from services.core.errors import Code, CodegraftError, LeaseLost, StateUnavailable
from services.core.jobs.progress import RateEstimate
from services.core.jobs.states import status_of
from services.core.state.table import Table

PROGRESS_SECONDS = 0.5
"""At most one progress write in so long."""
OUTAGE = timedelta(minutes=2)
"""How long a job's writes wait for NATS to come back before the attempt fails."""

logger = log.get(__name__)
M = TypeVar("M", bound=Message)


class JobContext(Generic[M]):
    """One attempt at a job, in the hands of the worker that claimed it.

    Attributes:
        job: the job as it was claimed.
        name: its resource name.
        epoch: fencing number of this attempt.
        cancelled: set when the handler should stop: the user cancelled or paused, the lease is lost, or the worker
            shuts down. The handler then raises JobCancelled; which of them it was, the runner knows.
        pausing: whether it should stop because of a pause, so that another attempt will go on from here.
        lost: whether the job is in other hands by now.
        outcome: the state to which this attempt has brought it, in a word; LOST while, or when, that is none.
    """

    def __init__(self, table: Table[M], job: M, name: str) -> None:
        self.job = job
        self.name = name
        self.epoch = status_of(job).epoch
        self.cancelled = asyncio.Event()
        self.pausing = False
        self.lost = False
        self.outcome = "LOST"
        self._table = table
        self._rate = RateEstimate()
        self._pending: Progress | None = None
        self._written = -PROGRESS_SECONDS

    def is_cancelled(self) -> bool:
        """Whether the handler should stop; may be asked from any thread."""
        return self.cancelled.is_set()

    async def update(self, change: Callable[[M], None]) -> M:
        """Changes the job's record while this attempt owns it; returns it as stored. Outages are waited for.

        Args:
            change: changes the message it is given, from nothing but that message, for it may run more than once.

        Raises:
            LeaseLost: the job belongs to another worker by now, has ended or was deleted. Stop working on it.
            StateUnavailable: NATS was away for longer than :data:`OUTAGE`.
        """
        deadline = time.monotonic() + OUTAGE.total_seconds()
        waits = Backoff()
        failures = 0
        while True:
            try:
                return await self._write(change)
            except StateUnavailable as error:
                if time.monotonic() > deadline:
                    raise
                logger.warning("a job's update waits for NATS", job=self.name, error=str(error))
            await asyncio.sleep(waits.delay(failures))
            failures += 1

    async def progress(
        self, done: float, total: float, unit: str, message: str = "", *, seconds_left: float | None = None
    ) -> None:
        """Says how far the job is; cheap enough for every step, for it writes at most twice a second.

        Args:
            done: units done so far.
            total: units in all; 0 while unknown.
            unit: what is counted: "files", "steps". Another unit begins a new estimate.
            message: the phase in a few words.
            seconds_left: until the end, where the caller knows better than the rate: not all units take as long.

        Raises:
            LeaseLost: as :meth:`update`.
        """
        now = time.monotonic()
        rate = self._rate.add(unit, done, now)
        progress = Progress(done=done, total=total, unit=unit, message=message, rate=rate or 0.0)
        if seconds_left is not None:
            progress.eta_seconds = max(0.0, seconds_left)
        elif rate and total >= done:
            progress.eta_seconds = (total - done) / rate
        self._pending = progress
        if now - self._written < PROGRESS_SECONDS:
            return  # the next call, update or heartbeat carries it
        self._written = now
        try:
            await self._write(lambda job: None)
        except StateUnavailable as error:
            # No reason to hold up the work.
            logger.warning("progress could not be written", job=self.name, error=str(error))

    def heed(self, status: JobStatus) -> None:
        """Tells the handler to stop when the job's status asks for it."""
        self.pausing = self.pausing or status.pause_requested
        if status.cancel_requested or status.pause_requested:
            self.cancelled.set()

    def lose(self) -> None:
        """Notes that the job is in other hands."""
        self.lost = True
        self.cancelled.set()

    async def _write(self, change: Callable[[M], None]) -> M:
        pending = self._pending

        def fenced(job: M) -> None:
            status = status_of(job)
            if status.epoch != self.epoch or status.state != JOB_STATE_RUNNING:
                raise LeaseLost(f"{self.name} is in other hands", hint="Stop: another worker took it over.")
            if pending is not None:
                status.progress.CopyFrom(pending)
            change(job)

        try:
            stored = await self._table.mutate(self.name, fenced)
        except LeaseLost:
            self.lose()
            raise
        except CodegraftError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            self.lose()
            raise LeaseLost(f"{self.name} was deleted") from error
        if self._pending is pending:
            self._pending = None
        self.heed(status_of(stored))
        return stored
