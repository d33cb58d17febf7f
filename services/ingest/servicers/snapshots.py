"""SnapshotService."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import grpc

from codegraft.ingest.v1 import snapshot_pb2 as pb
from codegraft.ingest.v1.snapshot_pb2_grpc import SnapshotServiceServicer
from services.core import names, pages
from services.core.audit import record as audit
from services.core.errors import InvalidArgument
from services.core.runtime import Runtime
from services.ingest import snapshot
from services.ingest.garbage import DEFAULT_AGE, LEAST_AGE, Garbage
from services.ingest.records import Tables
from services.ingest.snapshots import Snapshots

Context = grpc.aio.ServicerContext[Any, Any]


class SnapshotServicer(SnapshotServiceServicer):
    """See the proto for what every call does and which errors it has."""

    def __init__(self, tables: Tables, runtime: Runtime, snapshots: Snapshots) -> None:
        self._tables = tables
        self._runtime = runtime
        self._snapshots = snapshots

    async def CreateSnapshot(self, request: pb.CreateSnapshotRequest, context: Context) -> pb.CreateSnapshotResponse:
        return pb.CreateSnapshotResponse(snapshot=await self._snapshots.make(request.parent))

    async def GetSnapshot(self, request: pb.GetSnapshotRequest, context: Context) -> pb.GetSnapshotResponse:
        return pb.GetSnapshotResponse(snapshot=await self._snapshots.get(request.name))

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
        table = await self._snapshots.table(request.parent)
        files = await asyncio.to_thread(snapshot.files, table, begin, end)
        token = pages.token(end, request.parent) if end < table.num_rows else ""
        return pb.ListSnapshotFilesResponse(files=files, next_page_token=token)

    async def DiffSnapshots(self, request: pb.DiffSnapshotsRequest, context: Context) -> pb.DiffSnapshotsResponse:
        names.parse(names.SNAPSHOT, request.base, field="base")
        names.parse(names.SNAPSHOT, request.target, field="target")
        if names.project_of(request.base) != names.project_of(request.target):
            raise InvalidArgument(
                "the snapshots are of two projects", field="target", hint="Compare snapshots of one project."
            )
        scope = f"{request.base}..{request.target}"
        begin, end = pages.bounds(request.page_size, request.page_token, scope)
        base = await self._snapshots.table((await self._snapshots.get(request.base)).name)
        target = await self._snapshots.table((await self._snapshots.get(request.target)).name)
        found = await asyncio.to_thread(snapshot.diff, base, target)
        counts = Counter(difference.change for difference in found)
        return pb.DiffSnapshotsResponse(
            differences=[_difference(one, base, target) for one in found[begin:end]],
            next_page_token=pages.token(end, scope) if end < len(found) else "",
            added=counts[pb.FILE_CHANGE_ADDED],
            removed=counts[pb.FILE_CHANGE_REMOVED],
            modified=counts[pb.FILE_CHANGE_MODIFIED],
            moved=counts[pb.FILE_CHANGE_SPLIT],
        )

    async def DeleteSnapshot(self, request: pb.DeleteSnapshotRequest, context: Context) -> pb.DeleteSnapshotResponse:
        names.parse(names.SNAPSHOT, request.name)
        await self._snapshots.delete(request.name)
        return pb.DeleteSnapshotResponse()

    async def CollectGarbage(
        self, request: pb.CollectGarbageRequest, context: Context
    ) -> AsyncIterator[pb.CollectGarbageResponse]:
        age = timedelta(seconds=request.min_age_seconds) if request.min_age_seconds else DEFAULT_AGE
        if age < LEAST_AGE:
            raise InvalidArgument(
                f"min_age_seconds is {request.min_age_seconds}",
                field="min_age_seconds",
                hint=f"Give at least {LEAST_AGE.total_seconds():.0f}: what is younger may be on its way into a record.",
            )
        garbage = Garbage(self._runtime, self._tables, min_age=age, dry_run=request.dry_run)
        async for counts in garbage.collect():
            told = pb.CollectGarbageResponse(**asdict(counts))
            if counts.done and not request.dry_run:
                audit.note("garbage", None, told)
            yield told


def _difference(found: snapshot.Difference, base: Any, target: Any) -> pb.SnapshotDifference:
    difference = pb.SnapshotDifference(change=found.change)
    if found.before is not None:
        difference.before.CopyFrom(snapshot.files(base, found.before, found.before + 1)[0])
    if found.after is not None:
        difference.after.CopyFrom(snapshot.files(target, found.after, found.after + 1)[0])
    return difference
