"""SnapshotService."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc

from codegraft.event.v1.events_pb2 import SnapshotCreated
from codegraft.ingest.v1 import snapshot_pb2 as pb
from codegraft.ingest.v1.snapshot_pb2_grpc import SnapshotServiceServicer
from services.core import names, pages
from services.core.errors import NoSources, ResourceExists, SnapshotNotFound, Unavailable
from services.core.runtime import Runtime
from services.ingest import listing, snapshot
from services.ingest.fetcher import listing_key
from services.ingest.records import Tables

Context = grpc.aio.ServicerContext[Any, Any]
CREATED = "codegraft.ingest.snapshot.created.v1"
LATEST = "latest"
FILES = "files.parquet"


class SnapshotServicer(SnapshotServiceServicer):
    """See the proto for what every call does and which errors it has."""

    def __init__(self, tables: Tables, runtime: Runtime) -> None:
        self._tables = tables
        self._runtime = runtime

    async def CreateSnapshot(self, request: pb.CreateSnapshotRequest, context: Context) -> pb.CreateSnapshotResponse:
        project = await self._tables.known(request.parent)
        sources = [s for s in await self._tables.sources.all(request.parent + "/") if s.content_digest]
        if not sources:
            raise NoSources(
                f"{request.parent} has no source whose files are stored",
                field="parent",
                hint="Add a source and wait until it is READY.",
            )
        listings = await asyncio.gather(
            *(self._runtime.store.get(listing_key(source.name, source.content_digest)) for source in sources)
        )
        parts = [
            snapshot.Part(source, project.exclude, listing.from_parquet(table))
            for source, table in zip(sources, listings, strict=True)
        ]
        manifest, table = await asyncio.to_thread(snapshot.build, request.parent, parts)
        await self._runtime.artifacts.commit(manifest.name, manifest, {FILES: table})
        wanted = pb.Snapshot(
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
            return pb.CreateSnapshotResponse(snapshot=await self._tables.snapshots.get(wanted.name))
        event = SnapshotCreated(snapshot=stored.name, file_count=stored.file_count)
        with contextlib.suppress(Unavailable):  # the record is the truth
            await self._runtime.events.publish(CREATED, stored.name, event, id=stored.name)
        return pb.CreateSnapshotResponse(snapshot=stored)

    async def GetSnapshot(self, request: pb.GetSnapshotRequest, context: Context) -> pb.GetSnapshotResponse:
        ids = names.parse(names.SNAPSHOT, request.name)
        if ids["snapshot"] != LATEST:
            return pb.GetSnapshotResponse(snapshot=await self._tables.snapshots.get(request.name))
        newest, _ = await self._tables.snapshots.page(names.project_of(request.name), 1, "", newest_first=True)
        if not newest:
            raise SnapshotNotFound(
                f"{names.project_of(request.name)} has no snapshot yet", field="name", hint="Create one first."
            )
        return pb.GetSnapshotResponse(snapshot=newest[0])

    async def ListSnapshots(self, request: pb.ListSnapshotsRequest, context: Context) -> pb.ListSnapshotsResponse:
        await self._tables.known(request.parent)
        found, token = await self._tables.snapshots.page(
            request.parent, request.page_size, request.page_token, newest_first=True
        )
        return pb.ListSnapshotsResponse(snapshots=found, next_page_token=token)

    async def ListSnapshotFiles(
        self, request: pb.ListSnapshotFilesRequest, context: Context
    ) -> pb.ListSnapshotFilesResponse:
        names.parse(names.SNAPSHOT, request.parent, field="parent")
        await self._tables.snapshots.get(request.parent)
        begin, end = pages.bounds(request.page_size, request.page_token, request.parent)
        manifest = await self._runtime.artifacts.manifest(request.parent, pb.SnapshotManifest)
        folder = await self._runtime.artifacts.fetch(request.parent, manifest.files, [FILES])
        files = await asyncio.to_thread(snapshot.read_files, (folder / FILES).read_bytes())
        token = pages.token(end, request.parent) if end < len(files) else ""
        return pb.ListSnapshotFilesResponse(files=files[begin:end], next_page_token=token)
