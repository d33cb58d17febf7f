"""Taking, reading and deleting snapshots in the store and the records."""

from __future__ import annotations

import asyncio
import contextlib

import pyarrow as pa

from codegraft.event.v1.events_pb2 import SnapshotCreated
from codegraft.ingest.v1.snapshot_pb2 import Snapshot, SnapshotManifest
from codegraft.scanner.v1.dataset_pb2 import DatasetManifest
from services.core import names
from services.core.errors import (
    ArtifactNotFound,
    NoSources,
    NotFound,
    ResourceExists,
    SnapshotInUse,
    SnapshotNotFound,
    Unavailable,
)
from services.core.runtime import Runtime
from services.ingest import listing, snapshot
from services.ingest.listing import Listing
from services.ingest.records import Tables

CREATED = "codegraft.ingest.snapshot.created.v1"
LATEST = "latest"
FILES = "files.parquet"


class Snapshots:
    """The snapshots of all projects."""

    def __init__(self, runtime: Runtime, tables: Tables) -> None:
        self._runtime = runtime
        self._tables = tables

    async def make(self, parent: str, *at_hand: Listing) -> Snapshot:
        """Takes a snapshot of every source of the project that has files; the same content gives the same one.

        Args:
            at_hand: listings that need not be read from the store.

        Raises:
            ProjectNotFound, NoSources, StoreUnavailable, StateUnavailable.
        """
        project = await self._tables.known(parent)
        sources = [s for s in await self._tables.sources.all(parent + "/sources/") if s.content_digest]
        if not sources:
            raise NoSources(
                f"{parent} has no source whose files are stored",
                field="parent",
                hint="Add a source and wait until it is READY.",
            )
        listings = {one.digest: one for one in at_hand}
        for source in sources:
            if source.content_digest not in listings:
                table = await self._runtime.store.get(listing.key(source.name, source.content_digest))
                listings[source.content_digest] = await asyncio.to_thread(Listing.from_parquet, table)
        parts = [snapshot.Part(source, project, listings[source.content_digest]) for source in sources]
        manifest, table = await asyncio.to_thread(snapshot.build, parent, parts)
        if (there := await self._tables.snapshots.find(manifest.name)) is not None:
            return there
        try:
            await self._runtime.artifacts.commit(manifest.name, manifest, {FILES: table})
        except ResourceExists:
            # Committed before, by a process that died before it wrote the record. Its contents are the same, and lie
            # where that manifest says.
            manifest = await self._runtime.artifacts.manifest(manifest.name, SnapshotManifest)
        return await self._record(manifest)

    async def _record(self, manifest: SnapshotManifest) -> Snapshot:
        wanted = Snapshot(
            name=manifest.name,
            digest=manifest.digest,
            sources=manifest.sources,
            file_count=manifest.file_count,
            byte_count=manifest.byte_count,
        )
        wanted.create_time.GetCurrentTime()
        try:
            stored = await self._tables.snapshots.create(wanted)
        except ResourceExists:
            return await self._tables.snapshots.get(wanted.name)
        event = SnapshotCreated(snapshot=stored.name, file_count=stored.file_count)
        with contextlib.suppress(Unavailable):  # the record is the truth
            await self._runtime.events.publish(CREATED, stored.name, event, id=stored.name)
        return stored

    async def get(self, name: str) -> Snapshot:
        """One snapshot; the id "latest" names the newest. Raises SnapshotNotFound."""
        ids = names.parse(names.SNAPSHOT, name)
        if ids["snapshot"] != LATEST:
            return await self._tables.snapshots.get(name)
        newest, _ = await self._tables.snapshots.page(names.project_of(name), 1, "", newest_first=True)
        if not newest:
            raise SnapshotNotFound(
                f"{names.project_of(name)} has no snapshot yet", field="name", hint="Create one first."
            )
        return newest[0]

    async def table(self, name: str) -> pa.Table:
        """files.parquet of a snapshot."""
        manifest = await self._runtime.artifacts.manifest(name, SnapshotManifest)
        folder = await self._runtime.artifacts.fetch(name, manifest.files, [FILES])
        return await asyncio.to_thread(snapshot.read_table, folder / FILES)

    async def delete(self, name: str) -> None:
        """Deletes a snapshot that no dataset was made of.

        Raises:
            SnapshotNotFound, SnapshotInUse.
        """
        await self._tables.snapshots.get(name)
        if users := await self.datasets_of(names.project_of(name), {name}):
            raise SnapshotInUse(
                f"{name} is what {users[0]} was made of", field="name", hint="Delete the dataset first."
            )
        await self.drop(name)

    async def drop(self, name: str) -> None:
        """Deletes the record, then the manifest: what is left is out of reach, and garbage."""
        with contextlib.suppress(NotFound):
            await self._tables.snapshots.delete(name)
        await self._runtime.store.delete(f"{name}/manifest.json")

    async def datasets_of(self, parent: str, snapshots: set[str]) -> list[str]:
        """The datasets of the project that were made of one of the snapshots, by what is in the store."""
        users = []
        async for key in self._runtime.store.list(f"{parent}/datasets/"):
            name, _, file = key.rpartition("/")
            if file == "manifest.json":
                with contextlib.suppress(ArtifactNotFound):
                    if (await self._runtime.artifacts.manifest(name, DatasetManifest)).snapshot in snapshots:
                        users.append(name)
        return users
