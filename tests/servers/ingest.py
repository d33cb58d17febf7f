"""An ingest service in this process, over whatever runtime, and its client."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
from cryptography.fernet import Fernet

from codegraft.ingest.v1 import source_pb2
from services.client import Addresses, AsyncCodegraft
from services.core import errors
from services.core.audit.log import AuditLog
from services.core.auth.gate import Gate
from services.core.rpc.interceptors import CallInterceptor
from services.core.runtime import Runtime
from services.core.store import MemoryStore
from services.ingest.assembly import Ingest
from services.ingest.config import IngestSettings
from tests import published

KEY = Fernet.generate_key().decode()
PROJECT = "demo"


@contextlib.asynccontextmanager
async def serving(
    ingest: Ingest, gate: Gate | None = None, audit: AuditLog | None = None
) -> AsyncIterator[AsyncCodegraft]:
    """Serves, fetches and copies until the block ends."""
    server = grpc.aio.server(interceptors=[CallInterceptor(gate, audit)])
    for add, servicer, _ in ingest.services:
        add(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    runs = ingest.fetcher.run, ingest.deletions.run, *(one.run for one in ingest.mirrors)
    background = [asyncio.create_task(make()) for make in runs]
    address = f"127.0.0.1:{port}"
    try:
        async with AsyncCodegraft(Addresses(address, address, address, address)) as client:
            yield client
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await server.stop(None)


class World:
    """One ingest process over fakes of NATS and S3, and its client."""

    def __init__(self, runtime: Runtime, client: AsyncCodegraft, ingest: Ingest) -> None:
        self.runtime, self.client, self.ingest = runtime, client, ingest
        assert isinstance(runtime.store, MemoryStore)
        self.store = runtime.store

    async def add(self, url: str, **git: object) -> source_pb2.Source:
        origin = source_pb2.GitSource(url=url, **git)  # type: ignore[arg-type]
        added = await self.client.sources.add(PROJECT, source_pb2.Source(git=origin))
        return await self.client.sources.wait(added.name)

    async def sync(self, name: str) -> source_pb2.Source:
        await self.client.sources.sync(name)
        return await self.client.sources.wait(name)

    async def paths(self) -> list[str]:
        taken = await self.client.snapshots.create(PROJECT)
        return [file.path async for file in self.client.snapshots.files(taken.name)]


@contextlib.asynccontextmanager
async def world(tmp_path: Path, runtime: Runtime | None = None, **settings: object) -> AsyncIterator[World]:
    """One process with the project PROJECT; loopback is allowed, and it can keep credentials."""
    runtime = runtime or Runtime.memory(tmp_path / "cache")
    chosen: dict[str, object] = {"ingest_allowed_networks": ("127.0.0.0/8",), "ingest_credential_keys": (KEY,)}
    ingest = Ingest(
        runtime,
        IngestSettings(cache_dir=tmp_path / "cache", **(chosen | settings)),  # type: ignore[arg-type]
    )
    async with serving(ingest) as client:
        with contextlib.suppress(errors.ResourceExists):
            await client.projects.create(PROJECT)
        yield World(runtime, client, ingest)
    published.check("ingest", [runtime.events])


async def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)
