"""Collects what one source holds: opens it, reads it in a thread, and stores contents that are new."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from codegraft.ingest.v1.credential_pb2 import StoredCredential
from codegraft.ingest.v1.source_pb2 import Source
from services.core import log
from services.core.errors import EmptySource, NotFound
from services.core.runtime import Runtime
from services.core.store.packs import PACK_BYTES
from services.ingest import listing
from services.ingest.config import IngestSettings
from services.ingest.contents import Contents
from services.ingest.files import Entry, FoundFile
from services.ingest.limits import Meter
from services.ingest.listing import ListedFile
from services.ingest.reading import Reader, Reading, pinned
from services.ingest.records import Tables
from services.ingest.sources.git import Secret, SshKey
from services.ingest.uploads import Uploads

BATCH_ENTRIES = 5000
BATCH_SECONDS = 1.0

logger = log.get(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Collected:
    """What a source holds now."""

    files: list[ListedFile]
    skipped: dict[str, int]
    commit: str
    stored_bytes: int


class Collector:
    """Reads sources of every kind; keeps nothing between two of them."""

    def __init__(self, runtime: Runtime, settings: IngestSettings, tables: Tables, uploads: Uploads) -> None:
        self._runtime = runtime
        self._settings = settings
        self._credentials = tables.credentials
        self._uploads = uploads
        self._vault = settings.vault

    async def collect(self, source: Source, meter: Meter) -> Collected:
        """Reads the source and stores what is new.

        Raises:
            EmptySource: there is no file.
            CodegraftError: what the reader or the store says.
        """
        earlier = await self._earlier(source)
        contents = Contents(self._runtime.blobs, earlier, self._settings.ingest_puts)
        credential = await self._credential(source)
        secret = self._vault.open(credential.credential, credential.sealed) if credential is not None else None
        async with self._folder() as folder, _Thread() as thread:
            reader = Reader(folder, meter, self._settings.guard, contents.object_ids, self._settings.ingest_ca_file)
            opening = await self._opening(source, reader, secret, folder)
            try:
                reading = await thread.run(lambda: thread.stack.enter_context(opening))
                if reading.entries is not None:
                    while batch := await thread.run(_take, reading.entries):
                        await contents.add(batch)
                        meter.tell("reading", len(contents.files), 0)
                    await contents.finish()
                if credential is not None:
                    await self._used(credential, reading, secret)
            except asyncio.CancelledError:
                meter.stop.set()
                raise
            finally:
                await contents.abandon()
        if reading.entries is None:
            return Collected(list(earlier), dict(source.skipped), reading.commit, 0)
        files = listing.unique(contents.files)
        if replaced := len(contents.files) - len(files):
            contents.skipped["replaced"] += replaced
        if not files:
            left_out = ", ".join(f"{count} {why}" for why, count in sorted(contents.skipped.items()))
            raise EmptySource(
                "the source holds no file" + (f" (left out: {left_out})" if left_out else ""),
                hint="Check its sub-folder, or add another source.",
            )
        return Collected(files, dict(contents.skipped), reading.commit, contents.stored_bytes)

    async def _earlier(self, source: Source) -> list[ListedFile]:
        """The files of the last fetch; none when their listing is lost."""
        if not source.content_digest:
            return []
        try:
            table = await self._runtime.store.get(listing.key(source.name, source.content_digest))
            return await asyncio.to_thread(listing.from_parquet, table)
        except NotFound:
            logger.warning("the last listing is lost, fetching everything", source=source.name)
            return []

    async def _opening(
        self, source: Source, reader: Reader, secret: Secret | None, folder: Path
    ) -> AbstractContextManager[Reading]:
        """How the source is opened."""
        last_commit = source.commit if reader.known else ""
        match source.WhichOneof("origin"):
            case "git":
                return reader.open_git(source.git, secret, last_commit)
            case "bundle":
                content = await self._uploaded(source.bundle.upload, folder)
                return reader.open_bundle(source.bundle, content, last_commit)
            case "archive":
                return reader.open_archive(await self._uploaded(source.archive.upload, folder), source.archive.subpath)
            case "file":
                return reader.open_file(await self._uploaded(source.file.upload, folder), source.file.path)
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
        scratch = self._settings.cache_dir / "ingest"

        def make() -> Path:
            scratch.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix="fetch-", dir=scratch))

        folder = await asyncio.to_thread(make)
        try:
            yield folder
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


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
