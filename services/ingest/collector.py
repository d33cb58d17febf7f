"""Collects what one source holds: opens it, reads it in a thread, and stores contents that are new."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from codegraft.ingest.v1.credential_pb2 import StoredCredential
from codegraft.ingest.v1.source_pb2 import Source
from services.core import disk, log
from services.core.errors import EmptySource, NotFound, SourceUnreachable
from services.core.runtime import Runtime
from services.core.store.packs import PACK_BYTES
from services.core.telemetry import tracing
from services.ingest import listing
from services.ingest.config import IngestSettings
from services.ingest.contents import Contents
from services.ingest.files import Entry, FoundFile
from services.ingest.limits import Meter
from services.ingest.listing import EMPTY, Listing
from services.ingest.reading import REPOSITORY, Reader, Reading, pinned
from services.ingest.records import Tables
from services.ingest.sources.git import Secret, SshKey
from services.ingest.uploads import Uploads
from services.ingest.workspace import Workspace

BATCH_ENTRIES = 5000
BATCH_SECONDS = 1.0

logger = log.get(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Collected:
    """What a source holds now."""

    files: Listing
    """Stored under its digest."""
    skipped: dict[str, int]
    commit: str
    stored_bytes: int
    keep: bool
    """Whether the next fetch can build on the repository of this one."""


class Collector:
    """Reads sources of every kind."""

    def __init__(
        self, runtime: Runtime, settings: IngestSettings, tables: Tables, uploads: Uploads, workspace: Workspace
    ) -> None:
        self._runtime = runtime
        self._settings = settings
        self._credentials = tables.credentials
        self._uploads = uploads
        self._workspace = workspace
        self._vault = settings.vault

    async def collect(self, source: Source, meter: Meter) -> Collected:
        """Reads the source and stores what is new.

        Raises:
            EmptySource: there is no file.
            CodegraftError: what the reader or the store says.
        """
        async with self._folder() as folder:
            repository, aside = folder / REPOSITORY, folder / "aside"
            was_kept = await asyncio.to_thread(self._workspace.take, source, repository)
            try:
                with disk.writing(folder.parent):
                    collected = await self._collect(source, meter, folder)
            except SourceUnreachable:
                if not was_kept:
                    raise
                # The remote may be in trouble, or the kept repository damaged: tried without it, this shows.
                repository.rename(aside)
                try:
                    collected = await self._collect(source, meter.anew(), folder)
                except SourceUnreachable:
                    await asyncio.to_thread(self._workspace.give, source, aside)
                    raise
                logger.warning("the kept repository was damaged", source=source.name)
            if collected.keep:
                await asyncio.to_thread(self._workspace.give, source, repository)
            return collected

    async def _collect(self, source: Source, meter: Meter, folder: Path) -> Collected:
        listed = asyncio.create_task(self._earlier(source))  # meanwhile the source is opened
        loop = asyncio.get_running_loop()

        async def ids() -> frozenset[str]:
            return (await listed).object_ids()

        @functools.cache
        def known() -> frozenset[str]:
            return asyncio.run_coroutine_threadsafe(ids(), loop).result()

        try:
            async with _Thread() as thread:
                reader = Reader(folder, meter, self._settings.guard, known, self._settings.ingest_ca_file)
                return await self._read(source, reader, listed, thread)
        except asyncio.CancelledError:
            meter.stop.set()
            raise
        finally:
            listed.cancel()
            await asyncio.gather(listed, return_exceptions=True)

    async def _read(self, source: Source, reader: Reader, listed: asyncio.Task[Listing], thread: _Thread) -> Collected:
        credential = await self._credential(source)
        secret = self._vault.open(credential.credential, credential.sealed) if credential is not None else None
        opening = await self._opening(source, reader, secret)
        with tracing.span("open source"):  # clones, downloads, unpacks what has to be there first
            reading = await thread.run(lambda: thread.stack.enter_context(opening))
        earlier = await listed
        files, skipped = earlier, dict(source.skipped)
        contents = Contents(self._runtime.blobs, earlier, self._settings.ingest_puts)
        try:
            if reading.entries is not None:
                began = time.monotonic()
                while batch := await thread.run(_take, reading.entries):
                    await contents.add(batch)
                    reader.meter.tell("reading", len(contents.files), 0)
                tracing.took(
                    "read source", time.monotonic() - began, attributes={"codegraft.files": len(contents.files)}
                )
                files, skipped = await asyncio.to_thread(_listing, source, reading, contents, earlier)
                reader.meter.check_files(len(files))
                # The list and the last contents at once: nothing refers to either yet.
                await asyncio.gather(contents.finish(), self._store(source, files))
            if credential is not None:
                await self._used(credential, reading, secret)
        finally:
            await contents.abandon()
        return Collected(files, skipped, reading.commit, contents.stored_bytes, reading.keep)

    async def _store(self, source: Source, files: Listing) -> None:
        if files.digest != source.content_digest:
            table = await asyncio.to_thread(files.to_parquet)
            await self._runtime.store.put(listing.key(source.name, files.digest), table)

    async def _earlier(self, source: Source) -> Listing:
        """The files of the last fetch; none when their listing is lost."""
        if not source.content_digest:
            return EMPTY
        try:
            table = await self._runtime.store.get(listing.key(source.name, source.content_digest))
            return await asyncio.to_thread(Listing.from_parquet, table)
        except NotFound:
            logger.warning("the last listing is lost, fetching everything", source=source.name)
            return EMPTY

    async def _opening(self, source: Source, reader: Reader, secret: Secret | None) -> AbstractContextManager[Reading]:
        """How the source is opened."""
        match source.WhichOneof("origin"):
            case "git":
                return reader.open_git(source.git, secret, source.commit)
            case "bundle":
                content = await self._uploaded(source.bundle.upload, reader.folder)
                return reader.open_bundle(source.bundle, content, source.commit)
            case "archive":
                content = await self._uploaded(source.archive.upload, reader.folder)
                return reader.open_archive(content, source.archive.subpath)
            case "file":
                return reader.open_file(await self._uploaded(source.file.upload, reader.folder), source.file.path)
            case _:
                return reader.open_url(source.url)

    async def _uploaded(self, name: str, folder: Path) -> Path:
        upload = await self._uploads.get(name)
        target = folder / "content"
        await self._runtime.blobs.get_file(upload.sha256, target)
        return target

    async def _credential(self, source: Source) -> StoredCredential | None:
        return await self._credentials.get(source.git.credential) if source.git.credential else None

    async def _used(self, credential: StoredCredential, reading: Reading, secret: Secret | None) -> None:
        """Notes that the credential opened the source, and the host keys that were pinned meanwhile."""
        known = secret.known_hosts if isinstance(secret, SshKey) else ()
        new = await asyncio.to_thread(pinned, reading, known)

        def note(record: StoredCredential) -> None:
            record.credential.use_time.GetCurrentTime()
            record.credential.known_hosts.extend(line for line in new if line not in record.credential.known_hosts)

        with contextlib.suppress(NotFound):
            await self._credentials.mutate(credential.name, note)

    @contextlib.asynccontextmanager
    async def _folder(self) -> AsyncIterator[Path]:
        folder = self._workspace.folder()
        try:
            yield await asyncio.to_thread(folder.__enter__)
        finally:
            await asyncio.to_thread(folder.__exit__, None, None, None)


class _Thread:
    """One thread in which a source is opened, read and closed, so that the three cannot overlap."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        self.stack = contextlib.ExitStack()

    async def run(self, call: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call, *arguments)

    async def __aenter__(self) -> _Thread:
        return self

    async def __aexit__(self, *about: object) -> None:
        # Behind whatever still runs; a reader notices that it is to stop within a moment.
        await asyncio.shield(self.run(self.stack.close))
        self._executor.shutdown(wait=False)


def _listing(source: Source, reading: Reading, contents: Contents, earlier: Listing) -> tuple[Listing, dict[str, int]]:
    """All files, and counts of what was left out.

    Raises:
        EmptySource: there is no file.
    """
    skipped = contents.skipped.copy()
    if reading.since_last:
        files = earlier.replaced(contents.removed, contents.files)
        skipped.update(source.skipped)
    else:
        files = Listing.of(contents.files)
        skipped["replaced"] = len(contents.files) - len(files)
    told = {why: count for why, count in sorted(skipped.items()) if count}
    if not files:
        left_out = ", ".join(f"{count} {why}" for why, count in told.items())
        raise EmptySource(
            "the source holds no file" + (f" (left out: {left_out})" if left_out else ""),
            hint="Check its sub-folder, or add another source.",
        )
    _ = files.digest  # here, where nobody waits for it
    return files, told


def _take(entries: Iterator[Entry]) -> list[Entry]:
    """The next batch; empty at the end. Blocks; for a thread."""
    batch: list[Entry] = []
    size, began = 0, time.monotonic()
    for entry in entries:
        batch.append(entry)
        size += len(entry.data) if isinstance(entry, FoundFile) else 0
        if size >= PACK_BYTES or len(batch) >= BATCH_ENTRIES:
            break
        if len(batch) % 64 == 0 and time.monotonic() - began > BATCH_SECONDS:
            break
    return batch
