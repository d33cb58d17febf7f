"""What ingest says of its records, for the other services: sums that follow every change, and no stale ones."""

from __future__ import annotations

import asyncio

import pytest

from codegraft.access.v1.quota_pb2 import ProjectStorage, StoredPlaces
from codegraft.ingest.v1.source_pb2 import Source
from codegraft.ingest.v1.upload_pb2 import Upload
from services.core.auth.keyring import BUCKET
from services.core.runtime import Runtime
from services.core.state import StateStore
from services.ingest import records, storage
from services.ingest.records import Tables

A, B = "projects/a", "projects/b"


def key(project: str) -> str:
    return f"StoredPlaces/{project}/storage_bytes"


async def sums(state: StateStore, project: str) -> ProjectStorage:
    entry = await state.get(key(project))
    return StoredPlaces.FromString(entry.value or b"").recorded if entry else ProjectStorage()


async def test_sums_follow_the_records_and_go_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_TELL", 0.01)
    runtime = Runtime.memory()
    tables, told = Tables.of(runtime.state(records.BUCKET)), runtime.state(BUCKET)
    stale = StoredPlaces(recorded=ProjectStorage(sources=99)).SerializeToString()
    await told.create(key(B), stale)  # of what went while nobody told
    await tables.sources.create(Source(name=f"{A}/sources/s", byte_count=100))
    replicas = [asyncio.create_task(storage.Storage(runtime, tables).tell()) for _ in range(2)]

    async def until(uploads: int, sources: int) -> None:
        async with asyncio.timeout(5):
            while True:
                found = await sums(told, A)
                if (found.uploads, found.sources) == (uploads, sources):
                    return
                await asyncio.sleep(0.005)

    await until(0, 100)
    await tables.uploads.create(Upload(name=f"{A}/uploads/u", size=30))
    await tables.sources.mutate(f"{A}/sources/s", lambda it: setattr(it, "byte_count", 250))
    await until(30, 250)
    assert await sums(told, B) == ProjectStorage()
    await tables.uploads.delete(f"{A}/uploads/u")
    await tables.sources.delete(f"{A}/sources/s")
    await until(0, 0)
    for task in replicas:
        task.cancel()
    await asyncio.gather(*replicas, return_exceptions=True)
