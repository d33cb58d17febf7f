"""Works on scans: has the parts of a snapshot examined and measured, decides, stores verdicts and dataset.

The work itself is done in parts, by whatever replicas there are (part_worker.py); this puts the results together.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pyarrow.parquet as pq
from google.protobuf.message import Message

from codegraft.event.v1.events_pb2 import DatasetCreated
from codegraft.scanner.v1.dataset_pb2 import Dataset, DatasetManifest, VerdictsManifest
from codegraft.scanner.v1.scan_pb2 import Scan
from services.core import log, names
from services.core.errors import (
    CodegraftError,
    EmptyDataset,
    JobCancelled,
    ObjectNotFound,
    ResourceExists,
    StateUnavailable,
)
from services.core.jobs import JobContext
from services.core.jobs.parts import Parts, part_name
from services.core.models import catalogue, stored, weights
from services.core.quota.storage import size_of
from services.core.runtime import Runtime
from services.core.state import Table
from services.core.store import Packs
from services.core.telemetry import tracing
from services.scanner import dataset, examined, figures, pipeline, plan, report, rules, secrets, snapshot, text
from services.scanner.config import ScannerSettings
from services.scanner.loss import FileLoss, Threshold
from services.scanner.loss_cache import LossCache
from services.scanner.part_worker import EXAMINE, EXAMINE_FILES, KIND, MEASURE
from services.scanner.pipeline import Entry
from services.scanner.plan import Plan
from services.scanner.rules import Rules
from services.scanner.verdict import Verdict

FLUSH_SECONDS = 5.0
"""Between two writes of new losses into the cache, from which other scans profit."""

logger = log.get(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stage2:
    """What stage 2 leaves for the record."""

    model: str = ""
    model_digest: str = ""
    cached: int = 0
    thresholds: Mapping[str, Threshold] = field(default_factory=dict)


class ScanWorker:
    """The handler of scan jobs."""

    def __init__(
        self, runtime: Runtime, settings: ScannerSettings, scans: Table[Scan], datasets: Table[Dataset]
    ) -> None:
        self._runtime = runtime
        self._settings = settings
        self._scans = scans
        self._datasets = datasets

    async def handle(self, context: JobContext[Scan]) -> None:
        """Runs one scan to its end.

        Raises:
            EmptyDataset: no file was accepted for training; the verdicts say why.
            JobCancelled: it was asked for.
            QuotaExceeded: the project has no room for the verdicts or the dataset.
            CodegraftError: the snapshot or the model is not there, or the store is away.
        """
        parts = Parts(self._runtime.store, self._runtime.jobs, KIND, context.name)
        try:
            await self._scan(context, parts)
        except CodegraftError as error:
            # Else it goes on in another attempt, from where this one was.
            if error.is_callers_fault or (isinstance(error, JobCancelled) and await self._is_over(context.name)):
                await parts.clear()
            raise
        await parts.clear()

    async def _is_over(self, name: str) -> bool:
        scan = await self._scans.find(name)
        return scan is None or scan.status.cancel_requested

    async def _scan(self, context: JobContext[Scan], parts: Parts) -> None:
        scanned = await snapshot.manifest(self._runtime.artifacts, context.job.snapshot)
        settled, unknown = rules.of_scan(context.job, scanned, default_model=self._settings.scanner_model)
        began = time.monotonic()
        with _stage("1"), tempfile.TemporaryDirectory(prefix="codegraft-scan-") as name:
            entries = await self._stage1(context, parts, scanned.file_count, settled, Path(name))
        between = time.monotonic()
        stage2 = Stage2()
        if settled.loss_filter:
            with _stage("2"):
                stage2 = await self._stage2(context, parts, entries, settled)
        ended = time.monotonic()
        with _stage("3"), tempfile.TemporaryDirectory(prefix="codegraft-scan-") as name:
            folder = Path(name)
            origin = dataset.Origin(
                names.project_of(context.name),
                context.job.snapshot,
                stage2.model,
                stage2.model_digest,
                rules.to_settings(settled),
            )
            concluded = pipeline.conclude(entries, settled)
            verdicts, manifest = await self._store_verdicts(context, origin, concluded, folder)
            summary = report.summarize(
                verdicts,
                thresholds=stage2.thresholds,
                stage1_seconds=between - began,
                stage2_seconds=ended - between,
                cached_losses=stage2.cached,
            )
            summary.warnings.extend(
                f"the project switches {language!r} off, which is no language that linguist knows"
                for language in unknown
            )
            for warning in summary.warnings:
                logger.warning(warning, scan=context.name)

            def fill(scan: Scan) -> None:
                scan.report.CopyFrom(summary)
                scan.verdicts = context.name

            await context.update(fill)
            for reason, count in summary.reasons.items():
                figures.FILES.labels(reason).inc(count.files)
            if not summary.train.files:
                raise EmptyDataset(
                    f"none of the {summary.file_count} files was accepted for training",
                    hint="Read the scan's rejected log, and adjust masks, languages or limits.",
                )
            accepted = {entry.file.sha256: entry for entry in entries if entry.is_clean}
            await self._store_dataset(context, manifest, verdicts, accepted, folder)

    async def _stage1(
        self, context: JobContext[Scan], parts: Parts, count: int, settled: Rules, folder: Path
    ) -> list[Entry]:
        """Every file by the rules, and against all others."""
        shards = [folder / f"{index:05}.parquet" for index in range(-(-count // EXAMINE_FILES))]
        found: list[list[Entry]] = [[] for _ in shards]
        files = 0
        # With stage 2 to come nobody knows the end: no total, so no estimate.
        total = 0 if settled.loss_filter else count
        await context.progress(0, total, "files", f"stage 1: 0 of {count} files")
        async with contextlib.aclosing(parts.run(EXAMINE, len(shards), context.is_cancelled)) as ready:
            async for index in ready:
                if index is not None:
                    await parts.fetch(EXAMINE, index, shards[index])
                    found[index] = await asyncio.to_thread(examined.from_parquet, shards[index])
                    files = min(count, files + EXAMINE_FILES)
                await context.progress(files, total, "files", f"stage 1: {files} of {count} files")
        await context.progress(files, total, "files", "stage 1: duplicates")

        def join() -> list[Entry]:
            entries = list(itertools.chain.from_iterable(found))
            pipeline.mark_duplicates(entries, shards, settled)
            return entries

        return await _unless_cancelled(context, asyncio.to_thread(join))

    async def _stage2(
        self, context: JobContext[Scan], parts: Parts, entries: Sequence[Entry], settled: Rules
    ) -> Stage2:
        """The loss of every file that stage 1 left, from the cache where it is known."""
        spec = catalogue.find(settled.model)
        if not weights.is_cached(spec, self._settings.cache_dir):
            await context.progress(0, 0, "tokens", f"stage 2: bringing the model {spec.id}")
        await _unless_cancelled(context, stored.bring(spec, self._settings.cache_dir, self._runtime.artifacts))
        folder = await _unless_cancelled(
            context, asyncio.to_thread(weights.ensure_weights, spec, self._settings.cache_dir)
        )
        digest = await _unless_cancelled(context, asyncio.to_thread(weights.base_digest, folder))
        cache = LossCache(self._runtime.store, digest, settled)
        losses = await cache.load()
        planned = await self._plan(context, entries, settled, Plan(spec.id, digest, (), 0), losses)
        try:
            await self._measure(context, parts, planned, cache, losses)
        finally:
            await cache.flush()
        await cache.compact()
        thresholds = pipeline.judge_losses(entries, losses, settled)
        return Stage2(spec.id, digest, planned.cached, thresholds)

    async def _plan(
        self,
        context: JobContext[Scan],
        entries: Sequence[Entry],
        settled: Rules,
        empty: Plan,
        losses: Mapping[str, FileLoss],
    ) -> Plan:
        """What is to be measured: as an earlier attempt planned it, else what the cache does not have."""
        key = part_name(context.name, plan.PHASE, 0)
        with contextlib.suppress(ObjectNotFound):
            return plan.from_parquet(await self._runtime.store.get(key))
        wanted = {
            entry.text_sha256: plan.work_of(
                entry.file, entry.text_sha256, entry.characters, settled.max_tokens_per_file
            )
            for entry in entries
            if entry.is_clean
        }
        missing = [work for key, work in wanted.items() if key not in losses]
        made = plan.make(
            empty.model,
            empty.model_digest,
            missing,
            part_tokens=self._settings.part_tokens,
            cached=len(wanted) - len(missing),
        )
        await self._runtime.store.put(key, plan.to_parquet(made), if_absent=True)
        return made

    async def _measure(
        self, context: JobContext[Scan], parts: Parts, planned: Plan, cache: LossCache, losses: dict[str, FileLoss]
    ) -> None:
        files = sum(map(len, planned.parts))
        done_files, read, estimated = 0, 0, 0.0
        flushed = time.monotonic()
        await context.progress(0, planned.tokens, "tokens", f"stage 2: 0 of {files} files")
        async with contextlib.aclosing(parts.run(MEASURE, len(planned.parts), context.is_cancelled)) as ready:
            async for index in ready:
                if index is not None:
                    found = plan.losses_from_parquet(await parts.result(MEASURE, index))
                    for sha256, measured in found.items():
                        losses[sha256] = measured
                        cache.add(sha256, measured)
                    done_files += len(found)
                    read += sum(measured.sampled_tokens for measured in found.values())
                    estimated += sum(work.tokens for work in planned.parts[index])
                # The rest is as far off its estimate as what was read.
                total = read + (planned.tokens - estimated) * (read / estimated if estimated else 1)
                await context.progress(read, total, "tokens", f"stage 2: {done_files} of {files} files")
                if time.monotonic() - flushed >= FLUSH_SECONDS:
                    await cache.flush()
                    flushed = time.monotonic()

    async def _store_verdicts(
        self, context: JobContext[Scan], origin: dataset.Origin, verdicts: list[Verdict], folder: Path
    ) -> tuple[list[Verdict], DatasetManifest]:
        """Stores the verdicts; returns them and the manifest of their dataset. Those of an attempt that ended right
        after storing its own win: they are readable."""
        path = folder / dataset.VERDICTS
        await asyncio.to_thread(dataset.write_verdicts, verdicts, path)
        made = await asyncio.to_thread(dataset.manifest, origin, verdicts)
        manifest = VerdictsManifest(
            name=context.name, snapshot=context.job.snapshot, dataset=made.name if made.train.files else ""
        )
        try:
            await self._commit(context.name, manifest, {dataset.VERDICTS: path})
        except ResourceExists:
            verdicts = await stored_verdicts(self._runtime, context.name)
            made = await asyncio.to_thread(dataset.manifest, origin, verdicts)
        return verdicts, made

    async def _store_dataset(
        self,
        context: JobContext[Scan],
        manifest: DatasetManifest,
        verdicts: list[Verdict],
        accepted: Mapping[str, Entry],
        folder: Path,
    ) -> None:
        text_of = self._texts(accepted)
        written = await asyncio.to_thread(dataset.write, verdicts, text_of, folder)
        # Exists: an earlier scan made the same dataset; only last digits of losses can differ.
        with contextlib.suppress(ResourceExists):
            await self._commit(manifest.name, manifest, written)
        record = Dataset(
            name=manifest.name,
            digest=manifest.digest,
            scan=context.name,
            snapshot=manifest.snapshot,
            model=manifest.model,
            train=manifest.train,
            test=manifest.test,
        )
        record.create_time.GetCurrentTime()
        with contextlib.suppress(ResourceExists):
            await self._datasets.create(record)

        def name_dataset(scan: Scan) -> None:
            scan.dataset = manifest.name

        await context.update(name_dataset)
        try:
            await self._runtime.events.publish(
                "codegraft.scanner.dataset.created.v1",
                manifest.name,
                DatasetCreated(dataset=manifest.name, scan=context.name),
                id=f"{manifest.name}@{context.name}",
            )
        except StateUnavailable as error:
            logger.warning("an event could not be published", dataset=manifest.name, error=str(error))

    async def _commit(self, name: str, manifest: Message, files: Mapping[str, Path | bytes]) -> None:
        """Raises QuotaExceeded when the project has no room for it, ResourceExists when another is there."""
        async with self._runtime.storage.claim([names.project_of(name)], name, size_of(files)):
            await self._runtime.artifacts.commit(name, manifest, files)

    def _texts(self, accepted: Mapping[str, Entry]) -> Callable[[str], str]:
        """Reads the text of an accepted file by its SHA-256, without its secrets, for a thread."""
        packs = Packs(self._runtime.blobs)
        loop = asyncio.get_running_loop()

        def read(sha256: str) -> str:
            entry = accepted[sha256]
            file = entry.file
            reading = asyncio.run_coroutine_threadsafe(packs.get(file.place, file.size, sha256), loop)
            content = text.decode(reading.result()).text
            return secrets.finder(self._settings.cache_dir).redacted(content) if entry.redacted else content

        return read


@contextlib.contextmanager
def _stage(number: str) -> Iterator[None]:
    with tracing.span(f"scan stage {number}"), figures.STAGE_SECONDS.labels(number).time():
        yield


async def verdicts_file(runtime: Runtime, scan: str) -> Path:
    """verdicts.parquet of a scan, in the local cache.

    Raises:
        ArtifactNotFound: the scan has stored none.
    """
    manifest = await runtime.artifacts.manifest(scan, VerdictsManifest)
    return await runtime.artifacts.fetch(scan, manifest.files) / dataset.VERDICTS


async def stored_verdicts(runtime: Runtime, scan: str) -> list[Verdict]:
    """All verdicts of a scan."""
    table = await asyncio.to_thread(pq.read_table, await verdicts_file(runtime, scan))
    return [Verdict.of_row(row) for row in table.to_pylist()]


async def _unless_cancelled(context: JobContext[Scan], work: Awaitable[T]) -> T:
    """Waits for a thread that cannot be stopped, but no longer than until the scan is cancelled."""
    thread = asyncio.ensure_future(work)
    cancelled = asyncio.ensure_future(context.cancelled.wait())
    try:
        await asyncio.wait({thread, cancelled}, return_when=asyncio.FIRST_COMPLETED)
        if not thread.done():
            raise JobCancelled("the scan was cancelled")
        return thread.result()
    finally:
        cancelled.cancel()
