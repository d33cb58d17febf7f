"""Works on scans: reads the snapshot, runs the stages, stores verdicts and dataset."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
import time
from collections.abc import Awaitable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import pyarrow.parquet as pq

from codegraft.event.v1.events_pb2 import DatasetCreated
from codegraft.scanner.v1.dataset_pb2 import Dataset, VerdictsManifest
from codegraft.scanner.v1.scan_pb2 import Scan
from services.core import log, names
from services.core.errors import (
    DigestMismatch,
    EmptyDataset,
    JobCancelled,
    ObjectNotFound,
    ResourceExists,
    StateUnavailable,
)
from services.core.jobs import JobContext
from services.core.models import catalogue, weights
from services.core.runtime import Runtime
from services.core.state import Table
from services.core.store import Packs
from services.scanner import attributes, dataset, pipeline, report, rules, snapshot
from services.scanner.attributes import Attributes
from services.scanner.config import ScannerSettings
from services.scanner.loss import FileLoss, Threshold
from services.scanner.loss_cache import LossCache
from services.scanner.meter import Meter, Work
from services.scanner.pipeline import Entry
from services.scanner.rules import Rules
from services.scanner.snapshot import File
from services.scanner.stage1 import SourceMasks
from services.scanner.verdict import Verdict

MAX_ATTRIBUTES = 1 << 20
"""Bytes of the largest .gitattributes that is read."""
CHUNK = 64
"""Files that are read and examined together."""
FLUSH_SECONDS = 5.0
"""What a killed worker's successor has to measure again, at most, beside the group that was under way."""

logger = log.get(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stage2:
    """What stage 2 leaves for the record."""

    model: str = ""
    model_digest: str = ""
    cached: int = 0
    thresholds: Mapping[str, Threshold] = field(default_factory=dict)


class Texts:
    """Decoded texts by the SHA-256 of their file, in a folder: a repository's text need not fit into memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, sha256: str, text: str) -> None:
        (self._folder / sha256).write_bytes(text.encode())

    def get(self, sha256: str) -> str:
        return (self._folder / sha256).read_bytes().decode()


class ScanWorker:
    """The handler of scan jobs."""

    def __init__(
        self, runtime: Runtime, settings: ScannerSettings, datasets: Table[Dataset], meter: Meter | None = None
    ) -> None:
        self._runtime = runtime
        self._settings = settings
        self._datasets = datasets
        self._meter = meter or Meter(settings)

    async def handle(self, context: JobContext[Scan]) -> None:
        """Runs one scan to its end.

        Raises:
            EmptyDataset: no file was accepted for training; the verdicts say why.
            JobCancelled: it was asked for.
            CodegraftError: the snapshot or the model is not there, or the store is away.
        """
        settled = rules.resolve(context.job.settings, default_model=self._settings.scanner_model)
        manifest = await snapshot.manifest(self._runtime.artifacts, context.job.snapshot)
        settled, unknown = rules.of_project(settled, manifest.languages_off, manifest.exclude_licenses)
        files = await snapshot.files(self._runtime.artifacts, manifest)
        masks = snapshot.masks(list(manifest.sources), settled)
        honouring = {source.source for source in manifest.sources if source.honour_gitattributes}
        with tempfile.TemporaryDirectory(prefix="codegraft-scan-") as name:
            folder = Path(name)
            (folder / "texts").mkdir()
            texts = Texts(folder / "texts")
            began = time.monotonic()
            entries = await self._stage1(context, files, masks, honouring, settled, texts)
            between = time.monotonic()
            stage2 = await self._stage2(context, entries, settled, texts) if settled.loss_filter else Stage2()
            ended = time.monotonic()
            verdicts = await self._store_verdicts(context, pipeline.conclude(entries, settled), folder)
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
            if not summary.train.files:
                raise EmptyDataset(
                    f"none of the {summary.file_count} files was accepted for training",
                    hint="Read the scan's rejected log, and adjust masks, languages or limits.",
                )
            origin = dataset.Origin(
                names.project_of(context.name),
                context.job.snapshot,
                stage2.model,
                stage2.model_digest,
                rules.to_settings(settled),
            )
            await self._store_dataset(context, origin, verdicts, texts, folder)

    async def _stage1(
        self,
        context: JobContext[Scan],
        files: Sequence[File],
        masks: Mapping[str, SourceMasks],
        honouring: Collection[str],
        settled: Rules,
        texts: Texts,
    ) -> list[Entry]:
        """Every file by the rules; the texts of those that pass are kept."""

        def examine(chunk: Sequence[File], contents: Sequence[bytes | None]) -> list[Entry]:
            examined = []
            for file, data in zip(chunk, contents, strict=True):
                entry, text = pipeline.examine(file, data, settled, masks[file.source])
                if entry.is_clean:
                    texts.put(file.sha256, text)
                examined.append(entry)
            return examined

        entries: list[Entry] = []
        packs = Packs(self._runtime.blobs)
        masks = {
            source: replace(one, attributes=await self._attributes(source, files, packs))
            if source in honouring
            else one
            for source, one in masks.items()
        }
        chunks = [files[at : at + CHUNK] for at in range(0, len(files), CHUNK)]
        reading = asyncio.ensure_future(self._read(chunks[0] if chunks else [], settled, packs))
        try:
            for chunk, following in itertools.zip_longest(chunks, chunks[1:], fillvalue=()):
                if context.is_cancelled():
                    raise JobCancelled("the scan was cancelled")
                contents = await reading
                reading = asyncio.ensure_future(self._read(following, settled, packs))
                entries += await asyncio.to_thread(examine, chunk, contents)
                # With stage 2 to come nobody knows the end: no total, so no estimate.
                total = 0 if settled.loss_filter else len(files)
                await context.progress(len(entries), total, "files", f"stage 1: {len(entries)} of {len(files)} files")
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        await asyncio.to_thread(pipeline.mark_duplicates, entries)
        return entries

    async def _attributes(self, source: str, files: Sequence[File], packs: Packs) -> Attributes:
        """What the .gitattributes of a source say; one that cannot be read says nothing."""
        texts = {}
        for file in files:
            is_one = file.path == attributes.FILE or file.path.endswith("/" + attributes.FILE)
            if file.source == source and is_one and file.size <= MAX_ATTRIBUTES:
                with contextlib.suppress(ObjectNotFound, DigestMismatch):
                    texts[file.path] = (await packs.get(file.place, file.size, file.sha256)).decode(errors="replace")
        return Attributes(texts)

    async def _read(self, files: Sequence[File], settled: Rules, packs: Packs) -> list[bytes | None]:
        """The files' contents; None for those that are too large or damaged."""
        limit = asyncio.Semaphore(self._settings.scanner_reads)

        async def one(file: File) -> bytes | None:
            if file.size > settled.max_file_bytes:
                return None
            async with limit:
                try:
                    return await packs.get(file.place, file.size, file.sha256)
                except (ObjectNotFound, DigestMismatch) as error:
                    logger.warning("a file cannot be read", path=file.path, source=file.source, error=str(error))
                    return None

        return await asyncio.gather(*map(one, files))

    async def _stage2(
        self, context: JobContext[Scan], entries: Sequence[Entry], settled: Rules, texts: Texts
    ) -> Stage2:
        """The loss of every file that stage 1 left, from the cache where it is known."""
        spec = catalogue.find(settled.model)
        if not weights.is_cached(spec, self._settings.cache_dir):
            await context.progress(0, 0, "tokens", f"stage 2: bringing the model {spec.id}")
        folder = await _unless_cancelled(
            context, asyncio.to_thread(weights.ensure_weights, spec, self._settings.cache_dir)
        )
        digest = await _unless_cancelled(context, asyncio.to_thread(weights.base_digest, folder))
        cache = LossCache(self._runtime.store, digest, settled)
        losses = await cache.load()
        wanted = {entry.file.sha256: Work(entry.file.sha256, entry.characters) for entry in entries if entry.is_clean}
        # By digest: no order of sizes or folders that would make the estimate wrong.
        missing = [work for sha256, work in sorted(wanted.items()) if sha256 not in losses]
        if missing:
            await self._measure(context, folder, settled, missing, texts, cache, losses)
        await cache.compact()
        thresholds = pipeline.judge_losses(entries, losses, settled)
        return Stage2(spec.id, digest, len(wanted) - len(missing), thresholds)

    async def _measure(
        self,
        context: JobContext[Scan],
        folder: Path,
        settled: Rules,
        missing: Sequence[Work],
        texts: Texts,
        cache: LossCache,
        losses: dict[str, FileLoss],
    ) -> None:
        flushed = time.monotonic()
        try:
            async with contextlib.aclosing(self._meter.measure(folder, settled, missing, texts.get)) as steps:
                async for step in steps:
                    for sha256, measured in step.losses.items():
                        losses[sha256] = measured
                        cache.add(sha256, measured)
                    if context.is_cancelled():
                        raise JobCancelled("the scan was cancelled")
                    message = f"stage 2: {step.done_files} of {len(missing)} files"
                    await context.progress(step.done_tokens, step.total_tokens, "tokens", message)
                    if time.monotonic() - flushed >= FLUSH_SECONDS:
                        await cache.flush()
                        flushed = time.monotonic()
        finally:
            await cache.flush()

    async def _store_verdicts(self, context: JobContext[Scan], verdicts: list[Verdict], folder: Path) -> list[Verdict]:
        """Stores the verdicts. Those of an attempt that ended right after storing its own win: they are readable."""
        path = folder / dataset.VERDICTS
        await asyncio.to_thread(dataset.write_verdicts, verdicts, path)
        manifest = VerdictsManifest(name=context.name, snapshot=context.job.snapshot)
        try:
            await self._runtime.artifacts.commit(context.name, manifest, {dataset.VERDICTS: path})
        except ResourceExists:
            return await stored_verdicts(self._runtime, context.name)
        return verdicts

    async def _store_dataset(
        self, context: JobContext[Scan], origin: dataset.Origin, verdicts: list[Verdict], texts: Texts, folder: Path
    ) -> None:
        manifest = dataset.manifest(origin, verdicts)
        written = await asyncio.to_thread(dataset.write, verdicts, texts.get, folder)
        # Exists: an earlier scan made the same dataset; only last digits of losses can differ.
        with contextlib.suppress(ResourceExists):
            await self._runtime.artifacts.commit(manifest.name, manifest, written)
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
