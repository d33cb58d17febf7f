"""Fetches sources in the background: from where they come, through a reader, into blobs and a listing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

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
from services.core import log
from services.core.errors import CodegraftError, EmptySource, InternalError, NotFound, Unavailable
from services.core.runtime import Runtime
from services.core.state import Table
from services.ingest import listing
from services.ingest.config import IngestSettings
from services.ingest.files import FoundFile, Skipped, plain_path
from services.ingest.listing import ListedFile
from services.ingest.sources import archive, git, url
from services.ingest.uploads import Uploads

CHANGED = "codegraft.ingest.source.changed.v1"
BATCH_FILES = 64
BATCH_BYTES = 8 << 20
"""Files are read in batches of about this size, so that memory stays bounded whatever the source."""
PROGRESS_SECONDS = 0.5
RETRIES = 5
"""Tries of a fetch that fails for the store's or NATS's sake."""

logger = log.get(__name__)


class Fetcher:
    """Takes every source whose wanted generation is not fetched yet, a few at a time."""

    def __init__(self, runtime: Runtime, settings: IngestSettings, sources: Table[Source], uploads: Uploads) -> None:
        self._runtime = runtime
        self._settings = settings
        self._sources = sources
        self._uploads = uploads
        self._slots = asyncio.Semaphore(settings.ingest_fetches)
        self._running: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Follows the sources until cancelled. What a dead process left in FETCHING is fetched again."""
        try:
            async for source in self._sources.watch_all():
                due = source.fetched_generation < source.generation
                if due and source.name not in self._running:
                    task = asyncio.create_task(self._fetch(source.name))
                    self._running[source.name] = task
                    task.add_done_callback(lambda _, name=source.name: self._running.pop(name))  # type: ignore[misc]
        finally:
            for task in list(self._running.values()):
                task.cancel()

    async def _fetch(self, name: str) -> None:
        """Fetches until nothing newer is wanted."""
        async with self._slots:
            try:
                while (source := await self._sources.find(name)) and source.fetched_generation < source.generation:
                    await self._fetch_once(source)
            except NotFound:
                logger.info("the source was removed while it was fetched", source=name)

    async def _fetch_once(self, source: Source) -> None:
        began = time.monotonic()
        generation = source.generation
        await self._change(source.name, SOURCE_STATE_FETCHING)
        failure: CodegraftError | None = None
        files: list[ListedFile] = []
        skipped: Counter[str] = Counter()
        commit = ""
        try:
            for attempt in itertools.count(1):
                try:
                    files, skipped, commit = await self._read(source)
                    break
                except Unavailable:
                    if attempt == RETRIES:
                        raise
                    await asyncio.sleep(attempt)
        except CodegraftError as error:
            failure = error
        except Exception as error:
            logger.error("a fetch failed unexpectedly", source=source.name, exc_info=error)
            failure = InternalError(f"reading the source failed: {type(error).__name__}")
        if failure is None:
            table = listing.to_parquet(files)
            digest = listing.digest(files)
            await self._runtime.store.put(listing_key(source.name, digest), table)

            def ready(record: Source) -> None:
                record.commit = commit
                record.file_count = len(files)
                record.byte_count = sum(file.size for file in files)
                record.content_digest = digest
                record.skipped.clear()
                record.skipped.update(skipped)
                record.sync_time.GetCurrentTime()
                record.ClearField("failure")

            await self._change(source.name, SOURCE_STATE_READY, ready, generation)
            logger.info(
                "source fetched", source=source.name, files=len(files), seconds=round(time.monotonic() - began, 2)
            )
        else:
            told = Failure(reason=failure.reason, message=failure.message, hint=failure.hint)
            await self._change(
                source.name, SOURCE_STATE_FAILED, lambda record: record.failure.CopyFrom(told), generation
            )
            logger.warning("source failed", source=source.name, reason=failure.reason, error=failure.message)

    async def _change(self, name: str, state: SourceState, more: object = None, generation: int = 0) -> None:
        def change(record: Source) -> None:
            record.state = state
            record.ClearField("progress")
            if callable(more):
                more(record)
            if generation:
                record.fetched_generation = generation
                if record.generation > generation:
                    record.state = SOURCE_STATE_PENDING

        stored = await self._sources.mutate(name, change)
        word = SourceState.Name(stored.state).removeprefix("SOURCE_STATE_")
        event = SourceChanged(source=name, state=word, content_digest=stored.content_digest)
        with contextlib.suppress(Unavailable):  # the record is the truth; who follows it misses nothing
            await self._runtime.events.publish(CHANGED, name, event, id=f"{name}@{stored.etag}")

    async def _read(self, source: Source) -> tuple[list[ListedFile], Counter[str], str]:
        """The stored files, the counts of what was left out, and the commit.

        Raises:
            EmptySource: there is no file.
            CodegraftError: what the reader or the store says.
        """
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="fetch-", dir=self._scratch()))
        try:
            entries, commit = await self._open(source, folder)
            files: list[ListedFile] = []
            skipped: Counter[str] = Counter()
            told = 0.0
            while batch := await asyncio.to_thread(_take, entries):
                found = [entry for entry in batch if isinstance(entry, FoundFile)]
                skipped.update(entry.why for entry in batch if isinstance(entry, Skipped))
                files += await self._store(found)
                if time.monotonic() - told > PROGRESS_SECONDS:
                    told = time.monotonic()
                    progress = Progress(done=len(files), unit="files", message="reading")
                    await self._sources.mutate(
                        source.name,
                        lambda record, progress=progress: record.progress.CopyFrom(progress),  # type: ignore[misc]
                    )
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        if not files:
            left_out = ", ".join(f"{count} {why}" for why, count in sorted(skipped.items()))
            raise EmptySource(
                "the source holds no file" + (f" (left out: {left_out})" if left_out else ""),
                hint="Check its sub-folder, or add another source.",
            )
        return listing.unique(files), skipped, commit

    async def _open(self, source: Source, folder: Path) -> tuple[Iterator[FoundFile | Skipped], str]:
        """The entries of the source, and its commit when it is git."""
        limits, allowed = self._settings.limits, self._settings.ingest_allowed_urls
        match source.WhichOneof("origin"):
            case "git":
                origin = source.git
                repository = await asyncio.to_thread(
                    git.fetch, origin.url, origin.ref, folder / "repository", limits, allowed
                )
                return git.read(repository, origin.subpath, limits), repository.commit
            case "bundle":
                bundle = await self._uploaded(source.bundle.upload, folder)
                repository = await asyncio.to_thread(
                    git.unbundle, bundle, source.bundle.ref, folder / "repository", limits
                )
                return git.read(repository, source.bundle.subpath, limits), repository.commit
            case "archive":
                uploaded = await self._uploaded(source.archive.upload, folder)
                return archive.read(uploaded, source.archive.subpath, limits), ""
            case "file":
                uploaded = await self._uploaded(source.file.upload, folder)
                return _single(uploaded, source.file.path, limits.max_path_bytes), ""
            case _:
                target = folder / "download"
                await asyncio.to_thread(url.download, source.url.url, source.url.sha256, target, limits, allowed)
                if await asyncio.to_thread(archive.is_archive, target):
                    return archive.read(target, "", limits), ""
                name = source.url.url.partition("?")[0].rstrip("/").rsplit("/", 1)[-1]
                return _single(target, name, limits.max_path_bytes), ""

    async def _uploaded(self, name: str, folder: Path) -> Path:
        upload = await self._uploads.get(name)
        target = folder / "content"
        await self._runtime.blobs.get_file(upload.sha256, target)
        return target

    async def _store(self, found: Sequence[FoundFile]) -> list[ListedFile]:
        limit = asyncio.Semaphore(self._settings.ingest_puts)

        async def put(file: FoundFile) -> ListedFile:
            async with limit:
                return ListedFile(file.path, len(file.data), await self._runtime.blobs.put(file.data), file.mode)

        return await asyncio.gather(*(put(file) for file in found))

    def _scratch(self) -> Path:
        scratch = self._settings.cache_dir / "ingest"
        scratch.mkdir(parents=True, exist_ok=True)
        return scratch


def listing_key(source: str, digest: str) -> str:
    """Object key of a source's listing."""
    return f"{source}/listings/{digest}.parquet"


def _take(entries: Iterator[FoundFile | Skipped]) -> list[FoundFile | Skipped]:
    """The next batch; empty at the end. Blocks; for a thread."""
    batch: list[FoundFile | Skipped] = []
    size = 0
    for entry in entries:
        batch.append(entry)
        size += len(entry.data) if isinstance(entry, FoundFile) else 0
        if len(batch) >= BATCH_FILES or size >= BATCH_BYTES:
            break
    return batch


def _single(content: Path, path: str, max_path_bytes: int) -> Iterator[FoundFile | Skipped]:
    plain = plain_path(path, max_path_bytes)
    yield FoundFile(plain, content.read_bytes()) if plain is not None else Skipped("unsafe-path")
