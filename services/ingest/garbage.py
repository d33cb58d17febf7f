"""Garbage collection: removes from the object store what nothing refers to any more.

Mark, then sweep. Everything that a manifest of any room names is kept (datasets, checkpoints, training states), and so
are the packs of every recorded snapshot, of every source's current listing, and the uploads that sources were made of.
What is young stays in any case: it may be on its way into a record. A writer that meets an old blob of its own bytes
writes it anew (services/core/store/blobs.py), so that it is young again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from services.core import log
from services.core.errors import FailedPrecondition, NotFound
from services.core.runtime import Runtime
from services.core.store import StoredObject, blobs
from services.ingest import listing, snapshot
from services.ingest.listing import Listing
from services.ingest.records import Tables
from services.ingest.snapshots import Snapshots

LEAST_AGE = timedelta(hours=1)
DEFAULT_AGE = timedelta(days=1)
PARTS_AGE = timedelta(days=7)
_TELL_EVERY = 500

logger = log.get(__name__)


@dataclass(slots=True)
class Collected:
    """Counts so far."""

    examined: int = 0
    removed: int = 0
    removed_bytes: int = 0
    kept: int = 0
    young: int = 0
    done: bool = False


class Garbage:
    """Collects over all projects.

    Args:
        min_age: what was written within this time is kept.
        dry_run: only count.
    """

    def __init__(self, runtime: Runtime, tables: Tables, *, min_age: timedelta = DEFAULT_AGE, dry_run: bool) -> None:
        self._runtime = runtime
        self._tables = tables
        self._snapshots = Snapshots(runtime, tables)
        self._before = datetime.now(UTC) - min_age
        self._dry_run = dry_run
        self._counts = Collected()
        self._live: set[str] = set()
        """SHA-256 of the blobs that something refers to."""
        self._listings: set[str] = set()
        """Keys of the listings that sources refer to."""

    async def collect(self) -> AsyncIterator[Collected]:
        """Yields the counts now and then, and at the end.

        Raises:
            FailedPrecondition: there are snapshots in the store, but no project in the state.
        """
        orphans = [found async for found in self._mark_artifacts()]
        await self._mark_sources()
        for found in orphans:
            await self._sweep(found)
        async for found in self._runtime.store.objects("projects/"):
            if "/listings/" in found.key:
                await self._decide(found, found.key in self._listings)
            elif "/parts/" in found.key:  # of a job that never ended: nobody waits for them so long
                await self._decide(found, datetime.now(UTC) - found.modified < PARTS_AGE)
            if self._counts.examined % _TELL_EVERY == 1:
                yield self._counts
        async for found in self._runtime.store.objects(blobs.PREFIX):
            await self._decide(found, blobs.digest_in(found.key) in self._live)
            if self._counts.examined % _TELL_EVERY == 1:
                yield self._counts
        self._counts.done = True
        logger.info(
            "garbage collected",
            dry_run=self._dry_run,
            removed=self._counts.removed,
            removed_bytes=self._counts.removed_bytes,
            kept=self._counts.kept,
            young=self._counts.young,
        )
        yield self._counts

    async def _mark_artifacts(self) -> AsyncIterator[StoredObject]:
        """Marks what manifests name; yields the manifests of snapshots that have no record and are old."""
        snapshots = {record.name for record in await self._tables.snapshots.all()}
        projects = await self._tables.projects.all()
        async for found in self._manifests():
            name, _, file = found.key.rpartition("/")
            if file != "manifest.json":
                continue
            is_snapshot = "/snapshots/" in name
            if is_snapshot and not projects:
                raise FailedPrecondition(
                    "the store has snapshots, but the state knows no project: it may have been lost",
                    hint="Restore the state of NATS first; nothing was removed.",
                )
            if is_snapshot and name not in snapshots and found.modified < self._before:
                yield found
                continue
            try:
                manifest = json.loads(await self._runtime.store.get(found.key))
            except NotFound:
                continue
            self._live.update(file["sha256"] for file in manifest.get("files", []))
            if is_snapshot:
                self._live |= await asyncio.to_thread(snapshot.packs, await self._snapshots.table(name))

    async def _manifests(self) -> AsyncIterator[StoredObject]:
        """Objects of projects and of base models, the manifests of all artifacts among them."""
        for prefix in ("projects/", "models/"):
            async for found in self._runtime.store.objects(prefix):
                yield found

    async def _mark_sources(self) -> None:
        used: set[str] = set()
        for source in await self._tables.sources.all():
            used |= {source.bundle.upload, source.archive.upload, source.file.upload}
            if source.content_digest:
                key = listing.key(source.name, source.content_digest)
                self._listings.add(key)
                table = await self._runtime.store.get(key)
                self._live |= (await asyncio.to_thread(Listing.from_parquet, table)).packs()
        for upload in await self._tables.uploads.all():
            if upload.name in used or upload.complete_time.ToDatetime(UTC) > self._before:
                self._live.add(upload.sha256)
            elif not self._dry_run:
                await self._tables.uploads.delete(upload.name)

    async def _decide(self, found: StoredObject, live: bool) -> None:
        if live:
            self._counts.examined += 1
            self._counts.kept += 1
        else:
            await self._sweep(found)

    async def _sweep(self, found: StoredObject) -> bool:
        """Removes an object unless it is young; looks again just before, for it may have been written meanwhile."""
        self._counts.examined += 1
        again = await self._runtime.store.stat(found.key)
        if again is None:
            return False
        if again.modified >= self._before:
            self._counts.young += 1
            return False
        if not self._dry_run:
            await self._runtime.store.delete(found.key)
        self._counts.removed += 1
        self._counts.removed_bytes += found.size
        return True
