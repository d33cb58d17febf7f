"""Fetches sources in the background: when one is added or synced, and on its schedule.

Every process of the service does this; a source belongs to the one that holds its lease. The lease is in the source's
record, as is everything else: one compare-and-set decides, and a process that lost it writes nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from opentelemetry.trace import SpanKind

from codegraft.common.v1.job_pb2 import Failure, Progress
from codegraft.event.v1.events_pb2 import SourceChanged
from codegraft.ingest.v1.source_pb2 import (
    SOURCE_STATE_FAILED,
    SOURCE_STATE_FETCHING,
    SOURCE_STATE_PENDING,
    SOURCE_STATE_READY,
    Source,
    SourceState,
)
from services.core import disk, log, names
from services.core.errors import (
    CodegraftError,
    InternalError,
    LeaseLost,
    NotFound,
    Unavailable,
)
from services.core.quota.places import Places
from services.core.runtime import Runtime
from services.core.telemetry import metrics, tracing
from services.ingest import figures
from services.ingest.collector import Collected, Collector
from services.ingest.config import IngestSettings
from services.ingest.limits import Meter
from services.ingest.records import Tables
from services.ingest.snapshots import Snapshots
from services.ingest.storage import owners_of
from services.ingest.workspace import Workspace

CHANGED = "codegraft.ingest.source.changed.v1"
TICK = 1.0
"""Seconds between two looks at who is due, and between two reports of progress."""
TIDY = 60.0
"""Seconds between two looks at what lies on the local disk."""
RETRIES = 5
"""Tries of a fetch that fails for the store's or NATS's sake."""

logger = log.get(__name__)
News = list[tuple[str, int, int]]
"""What a reader told and nobody has written down yet; the last one counts."""


class Fetcher:
    """Takes every source whose wanted generation is not fetched yet, a few at a time."""

    def __init__(
        self,
        runtime: Runtime,
        settings: IngestSettings,
        tables: Tables,
        collector: Collector,
        snapshots: Snapshots,
        workspace: Workspace,
        places: Places,
    ) -> None:
        self._places = places
        self._runtime = runtime
        self._settings = settings
        self._sources = tables.sources
        self._collector = collector
        self._snapshots = snapshots
        self._workspace = workspace
        self._id = f"ingest-{secrets.token_hex(6)}"
        self._slots = asyncio.Semaphore(settings.ingest_fetches)
        self._running: dict[str, asyncio.Task[None]] = {}
        self._seen: dict[str, Source] = {}
        self._telling: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Follows the sources until cancelled. What a dead process left is fetched again once its lease has ended."""
        clock = asyncio.gather(self._tick(), self._tidy())
        states = figures.States(self._seen)
        metrics.register(states)
        try:
            async for change in self._sources.follow():
                if change.message is None:
                    self._seen.pop(change.name, None)
                    continue
                self._seen[change.name] = change.message
                self._begin_if_due(change.message, change.traceparent)
        finally:
            metrics.unregister(states)
            clock.cancel()
            running = list(self._running.values())
            for task in running:
                task.cancel()
            await asyncio.gather(clock, *running, return_exceptions=True)
            await asyncio.gather(*self._telling)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            for source in list(self._seen.values()):
                try:
                    if _is_scheduled(source):
                        self._seen[source.name] = source = await self._sources.mutate(source.name, _schedule)
                    self._begin_if_due(source)
                except NotFound:
                    self._seen.pop(source.name, None)
                except CodegraftError as error:
                    logger.warning("the schedule could not be kept", source=source.name, error=error.message)

    async def _tidy(self) -> None:
        """Now and then, and that is also when the code of a removed source goes from this disk."""
        while True:
            with contextlib.suppress(Unavailable):
                await asyncio.to_thread(self._workspace.tidy, await self._sources.all())
            await asyncio.sleep(TIDY)

    def _begin_if_due(self, source: Source, traceparent: str = "") -> None:
        if source.name in self._running or not _is_due(source, self._id):
            return
        task = asyncio.create_task(self._fetch(source.name, traceparent))
        self._running[source.name] = task
        task.add_done_callback(lambda _: self._running.pop(source.name))

    async def _fetch(self, name: str, traceparent: str) -> None:
        """Fetches until nothing newer is wanted, or another process has it."""
        async with self._slots:
            try:
                while (source := await self._sources.find(name)) and _is_due(source, self._id):
                    with tracing.span("fetch source", SpanKind.CONSUMER, traceparent, {"codegraft.source": name}):
                        await self._fetch_once(await self._take(name))
            except (NotFound, LeaseLost) as error:
                logger.info("a fetch was given up", source=name, why=error.message)
            except Unavailable as error:  # the record stays due: the next tick tries again
                logger.warning("a fetch could not be recorded", source=name, error=error.message)

    async def _take(self, name: str) -> Source:
        def take(record: Source) -> None:
            if not _is_due(record, self._id):
                raise LeaseLost(f"{name} is fetched by {record.fetcher}")
            record.state = SOURCE_STATE_FETCHING
            record.fetcher = self._id
            record.attempt_time.GetCurrentTime()
            record.ClearField("progress")
            self._extend(record)

        return self._announced(await self._sources.mutate(name, take))

    async def _fetch_once(self, source: Source) -> None:
        began = time.monotonic()
        news: News = []
        meter = Meter(self._settings.limits, tell=lambda *told: news.append(told))
        keeper = asyncio.create_task(self._keep(source.name, news))
        failure: CodegraftError | None = None
        fetched: Collected | None = None
        try:
            work = asyncio.create_task(self._attempts(source, meter))
            await asyncio.wait({work, keeper}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():  # the lease is lost, or the source was removed
                await _ended(work, meter)
                await keeper
            fetched = await work
            async with self._places.claim(_owners(source), source.name, fetched.files.byte_count):
                await self._finish(source, fetched)
        except (LeaseLost, NotFound) as error:
            if await self._sources.find(source.name) is None or isinstance(error, LeaseLost):
                raise
            failure = error
        except CodegraftError as error:
            failure = error
        except asyncio.CancelledError:
            await _ended(work, meter)
            raise
        except Exception as error:
            failure = disk.full(error)
            if failure is None:
                logger.error("a fetch failed unexpectedly", source=source.name, exc_info=error)
                failure = InternalError(f"reading the source failed: {type(error).__name__}")
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        if failure is not None:
            told = Failure(reason=failure.reason, message=failure.message, hint=failure.hint)
            await self._end(source, SOURCE_STATE_FAILED, lambda record: record.failure.CopyFrom(told))
            tracing.failed(failure)
            figures.FETCH_SECONDS.labels(failure.reason).observe(time.monotonic() - began)
            logger.warning("source failed", source=source.name, reason=failure.reason, error=failure.message)
        elif fetched is not None:
            figures.FETCH_SECONDS.labels("FETCHED").observe(time.monotonic() - began)
            figures.FETCHED_FILES.inc(len(fetched.files))
            figures.STORED_BYTES.inc(fetched.stored_bytes)
            logger.info(
                "source fetched",
                source=source.name,
                files=len(fetched.files),
                commit=fetched.commit,
                stored_bytes=fetched.stored_bytes,
                seconds=round(time.monotonic() - began, 2),
            )

    async def _attempts(self, source: Source, meter: Meter) -> Collected:
        for attempt in itertools.count(1):
            try:
                rooms = [await self._places.room(owner, source.name) for owner in _owners(source)]
                meter.room = min((room for room in rooms if room), key=lambda room: room.left, default=None)
                return await self._collector.collect(source, meter.anew())
            except Unavailable:
                if attempt == RETRIES:
                    raise
                await asyncio.sleep(attempt)
        raise AssertionError

    async def _finish(self, source: Source, fetched: Collected) -> None:
        """Makes what was fetched the source's content, and takes a snapshot when a sync brought something new."""
        digest = fetched.files.digest

        def store(record: Source) -> None:
            record.commit = fetched.commit
            record.file_count = len(fetched.files)
            record.byte_count = fetched.files.byte_count
            record.stored_bytes = fetched.stored_bytes
            record.content_digest = digest
            record.skipped.clear()
            record.skipped.update(fetched.skipped)
            record.sync_time.GetCurrentTime()
            record.ClearField("failure")
            record.ClearField("snapshot")

        await self._mine(source.name, store)
        snapshot = ""
        if source.content_digest and source.content_digest != digest:
            try:
                snapshot = (await self._snapshots.make(names.project_of(source.name), fetched.files)).name
            except CodegraftError as error:
                logger.warning("no snapshot could be taken", source=source.name, error=error.message)
        await self._end(source, SOURCE_STATE_READY, lambda record: setattr(record, "snapshot", snapshot))

    async def _end(self, source: Source, state: SourceState, change: Callable[[Source], None]) -> None:
        def end(record: Source) -> None:
            change(record)
            record.fetched_generation = source.generation
            # Something newer may have been asked for meanwhile.
            record.state = state if record.generation == source.generation else SOURCE_STATE_PENDING
            for field in ("progress", "fetcher", "lease_expire_time"):
                record.ClearField(field)

        self._announced(await self._mine(source.name, end))

    async def _mine(self, name: str, change: Callable[[Source], None]) -> Source:
        """Changes the record as long as the lease is held."""

        def guarded(record: Source) -> None:
            if record.fetcher != self._id:
                raise LeaseLost(f"{name} is fetched by {record.fetcher or 'nobody'} now")
            change(record)

        return await self._sources.mutate(name, guarded)

    async def _keep(self, name: str, told: News) -> None:
        """Extends the lease, and writes down how far the fetch is."""
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(TICK / 2)
            news, told[:] = told[-1:], []
            if not news and time.monotonic() - renewed < self._settings.ingest_lease_seconds / 3:
                continue

            def extend(record: Source, news: News = news) -> None:
                self._extend(record)
                for message, done, total in news:
                    unit = "bytes" if message == "downloading" else "files" if message == "reading" else "objects"
                    record.progress.CopyFrom(Progress(done=done, total=total, unit=unit, message=message))

            with contextlib.suppress(Unavailable):  # the lease outlives a short outage
                await self._mine(name, extend)
                renewed = time.monotonic()

    def _extend(self, record: Source) -> None:
        ends = datetime.now(UTC) + timedelta(seconds=self._settings.ingest_lease_seconds)
        record.lease_expire_time.FromDatetime(ends)

    def _announced(self, source: Source) -> Source:
        """Publishes the source's state, while the work goes on."""
        task = asyncio.create_task(self._publish(source))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)
        return source

    async def _publish(self, source: Source) -> None:
        word = SourceState.Name(source.state).removeprefix("SOURCE_STATE_")
        event = SourceChanged(source=source.name, state=word, content_digest=source.content_digest)
        with contextlib.suppress(Unavailable):  # the record is the truth; who follows it misses nothing
            await self._runtime.events.publish(CHANGED, source.name, event, id=f"{source.name}@{source.etag}")


def _owners(source: Source) -> list[str]:
    """Whose quotas its files have to fit."""
    return owners_of(names.project_of(source.name), source.creator)


async def _ended(work: asyncio.Task[Collected], meter: Meter) -> None:
    meter.stop.set()
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


def _is_due(source: Source, me: str) -> bool:
    if source.fetched_generation >= source.generation:
        return False
    held = source.HasField("lease_expire_time") and source.lease_expire_time.ToDatetime(UTC) > datetime.now(UTC)
    return not held or source.fetcher == me


def _is_scheduled(source: Source) -> bool:
    """Whether its interval has passed and nothing is under way."""
    if not source.sync_interval_seconds or source.fetched_generation < source.generation:
        return False
    last = source.attempt_time.ToDatetime(UTC)
    return datetime.now(UTC) >= last + timedelta(seconds=source.sync_interval_seconds)


def _schedule(record: Source) -> None:
    if _is_scheduled(record):  # another process may have been faster
        record.generation += 1
        record.state = SOURCE_STATE_PENDING
