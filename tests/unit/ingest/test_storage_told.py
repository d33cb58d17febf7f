"""What ingest says of its records, for the other services: sums that follow every change, and no stale ones."""

from __future__ import annotations

import asyncio

import pytest

from codegraft.access.v1.quota_pb2 import ProjectStorage
from codegraft.ingest.v1.source_pb2 import Source
from codegraft.ingest.v1.upload_pb2 import Upload
from services.core.auth.keyring import BUCKET
from services.core.quota.storage import sums
from services.core.runtime import Runtime
from services.ingest import records, storage
from services.ingest.records import Tables

A, B = "projects/a", "projects/b"


async def test_sums_follow_the_records_and_go_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_TELL", 0.01)
    runtime = Runtime.memory()
    tables, told = Tables.of(runtime.state(records.BUCKET)), sums(runtime.state(BUCKET))
    await told.create(ProjectStorage(name=B, sources=99))  # of what went while nobody told
    await tables.sources.create(Source(name=f"{A}/sources/s", byte_count=100))
    replicas = [asyncio.create_task(storage.Storage(runtime, tables).tell()) for _ in range(2)]

    async def until(uploads: int, sources: int) -> None:
        async with asyncio.timeout(5):
            while True:
                found = await told.find(A) or ProjectStorage()
                if (found.uploads, found.sources) == (uploads, sources):
                    return
                await asyncio.sleep(0.005)

    await until(0, 100)
    await tables.uploads.create(Upload(name=f"{A}/uploads/u", size=30))
    await tables.sources.mutate(f"{A}/sources/s", lambda it: setattr(it, "byte_count", 250))
    await until(30, 250)
    assert await told.find(B) is None
    await tables.uploads.delete(f"{A}/uploads/u")
    await tables.sources.delete(f"{A}/sources/s")
    await until(0, 0)
    assert await told.find(A) is None
    for task in replicas:
        task.cancel()
    await asyncio.gather(*replicas, return_exceptions=True)
