"""Jobs that are cut into parts, so that every replica works on them.

A part has a name, ``<job>/parts/<phase>-00007``, and its result is the object of that name in the store. The result
depends on nothing but the name: whoever makes it, and however often, makes the same bytes. So a lost, repeated or late
message changes nothing, and neither does a worker that is killed.

    coordinator (the job's handler)              worker (any replica)
    submit the parts that have no result  --->   take one, make its result, store it
    see the results come                  <---   (or the reason why it cannot be made)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from opentelemetry.trace import SpanKind

from services.core import disk, log
from services.core.backoff import Backoff
from services.core.errors import CodegraftError, InternalError, JobCancelled, by_reason
from services.core.jobs.queue import ACK_WAIT, Delivery, JobQueue
from services.core.store import ObjectStore
from services.core.telemetry import figures, tracing

TAKE_SECONDS = 5.0
MAX_ATTEMPTS = 3
RESUBMIT_SECONDS = 20.0
"""A part without result is submitted again this often: the queue may have been lost. It refuses what it has."""
LOOK_FIRST, LOOK_LONGEST = 0.05, 0.5
"""Seconds between two looks for results; the longer nothing comes, the longer."""
FAILED = ".failed"

logger = log.get(__name__)

Make = Callable[[str], Awaitable[bytes | None]]
"""Makes the result of a part by its name; None when nobody wants it any more."""


def part_name(job: str, phase: str, index: int) -> str:
    """Name of a part, which is the key of its result."""
    return f"{job}/parts/{phase}-{index:05}"


def parse_part(name: str) -> tuple[str, str, int]:
    """Job, phase and index of a part's name."""
    job, _, part = name.rpartition("/parts/")
    phase, _, index = part.rpartition("-")
    return job, phase, int(index)


class Parts:
    """The coordinator's side: the parts of one job."""

    def __init__(self, store: ObjectStore, queue: JobQueue, kind: str, job: str) -> None:
        self._store = store
        self._queue = queue
        self._kind = kind
        self._job = job

    async def run(self, phase: str, count: int, is_cancelled: Callable[[], bool]) -> AsyncGenerator[int | None, None]:
        """Has the parts 0 to count of a phase made; yields the index of each as its result is there.

        Yields None now and then when nothing has come, so that whoever tells of the progress can go on telling.

        Raises:
            JobCancelled: ``is_cancelled`` said so.
            CodegraftError: why a part cannot be made.
        """
        waiting = {part_name(self._job, phase, index): index for index in range(count)}
        for key in await self._keys(phase):
            if key.endswith(FAILED):  # an earlier attempt's: this one tries anew
                await self._store.delete(key)
        counted = figures.PARTS_WAITING.labels(self._kind)
        counted.inc(count)
        try:
            async with contextlib.aclosing(self._made(phase, waiting, is_cancelled)) as made:
                async for index in made:
                    counted.dec(index is not None)
                    yield index
        finally:
            counted.dec(len(waiting))

    async def _made(
        self, phase: str, waiting: dict[str, int], is_cancelled: Callable[[], bool]
    ) -> AsyncGenerator[int | None, None]:
        submitted = -RESUBMIT_SECONDS
        pause = LOOK_FIRST
        while waiting:
            if is_cancelled():
                raise JobCancelled(f"{self._job} was cancelled")
            keys = await self._keys(phase)
            for key in keys & {name + FAILED for name in waiting}:
                raise _failure(await self._store.get(key))
            done = sorted(keys & waiting.keys())
            for name in done:
                yield waiting.pop(name)
            if time.monotonic() - submitted >= RESUBMIT_SECONDS:
                for name in waiting:
                    await self._queue.submit(self._kind, name)
                submitted = time.monotonic()
            pause = LOOK_FIRST if done else min(pause * 1.5, LOOK_LONGEST)
            if waiting:
                if not done:
                    yield None
                await asyncio.sleep(pause)

    async def result(self, phase: str, index: int) -> bytes:
        """What a part resulted in.

        Raises:
            ObjectNotFound: it has no result yet.
        """
        return await self._store.get(part_name(self._job, phase, index))

    async def fetch(self, phase: str, index: int, to: Path) -> None:
        """Writes what a part resulted in to a file."""
        await self._store.get_file(part_name(self._job, phase, index), to)

    async def clear(self) -> None:
        """Removes all results: the job has ended."""
        for key in await self._keys(""):
            await self._store.delete(key)

    async def _keys(self, phase: str) -> set[str]:
        return {key async for key in self._store.list(f"{self._job}/parts/{phase}")}


class PartRunner:
    """The worker's side: makes parts of any job of a kind, one at a time. More runners make more.

    Args:
        make: must not block the event loop for longer than a third of the lease.
        lease: how long a silent worker keeps a part, as the queue was told.
        retry: waits between the attempts at a part that fails.
    """

    def __init__(
        self,
        kind: str,
        store: ObjectStore,
        queue: JobQueue,
        make: Make,
        *,
        lease: timedelta = ACK_WAIT,
        retry: Backoff = Backoff(),  # noqa: B008  frozen
    ) -> None:
        self._kind = kind
        self._store = store
        self._lease = lease
        self._queue = queue
        self._make = make
        self._retry = retry
        figures.DEAD.labels(kind)

    async def run(self) -> NoReturn:
        """Takes parts until it is cancelled; outages of NATS and the store are logged and waited for."""
        waits = Backoff()
        failures = 0
        while True:
            try:
                if (delivery := await self._queue.take(self._kind, TAKE_SECONDS)) is not None:
                    await self._take(delivery)
                failures = 0
            except CodegraftError as error:
                logger.warning("the worker stumbled", kind=self._kind, error=error.message)
                await asyncio.sleep(waits.delay(failures))
                failures += 1

    async def _take(self, delivery: Delivery) -> None:
        with log.bound(part=delivery.name):
            if await self._store.size(delivery.name) is not None:  # made by another worker, or in an earlier attempt
                await delivery.ack()
                return
            beating = asyncio.create_task(_beat(delivery, self._lease))
            try:
                with (
                    figures.timed_part(self._kind),
                    tracing.span(
                        self._kind, SpanKind.CONSUMER, delivery.traceparent, {"codegraft.part": delivery.name}
                    ),
                ):
                    result = await self._make(delivery.name)
                    if result is not None:
                        await self._store.put(delivery.name, result, if_absent=True)
                await delivery.ack()
            except JobCancelled:
                await delivery.ack()
            except asyncio.CancelledError:
                with contextlib.suppress(CodegraftError):
                    await delivery.nak()
                raise
            except Exception as error:
                await self._failed(delivery, error)
            finally:
                beating.cancel()
                await asyncio.gather(beating, return_exceptions=True)

    async def _failed(self, delivery: Delivery, error: Exception) -> None:
        error = disk.full(error) or error
        known = isinstance(error, CodegraftError)
        logger.warning("a part failed", attempt=delivery.attempt, error=str(error), exc_info=None if known else error)
        if not known:
            # The text of an unforeseen error may hold paths or data: it is in the log.
            told: CodegraftError = InternalError(
                f"an unexpected error ended a part of it ({type(error).__name__})", hint="See the workers' logs."
            )
        else:
            told = error  # type: ignore[assignment]
        if delivery.attempt < MAX_ATTEMPTS and not told.is_callers_fault:
            await delivery.nak(self._retry.delay(delivery.attempt - 1))
            return
        said = {"reason": told.reason, "message": told.message, "hint": told.hint}
        await self._store.put(delivery.name + FAILED, json.dumps(said).encode())
        await delivery.dead_letter(f"{told.reason}: {told.message}")
        figures.DEAD.labels(self._kind).inc()


async def _beat(delivery: Delivery, lease: timedelta) -> None:
    while True:
        await asyncio.sleep(lease.total_seconds() / 3)
        with contextlib.suppress(CodegraftError):  # then it is handed out again, and made twice: no harm
            await delivery.in_progress()


def _failure(said: bytes) -> CodegraftError:
    told = json.loads(said)
    return by_reason(told["reason"])(told["message"], hint=told["hint"])
