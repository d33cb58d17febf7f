"""Ingest, scanner and trainer without workers, each behind a port of its own with keys, quotas and an audit log."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from codegraft.scanner.v1 import scan_pb2_grpc
from codegraft.scanner.v1.dataset_pb2 import Dataset, DatasetManifest, DatasetPart
from codegraft.scanner.v1.scan_pb2 import Scan
from services.client import Addresses, AsyncCodegraft
from services.core.auth.gate import Gate
from services.core.auth.keyring import BUCKET, Keyring
from services.core.auth.keys import ApiKey
from services.core.errors import DatasetNotFound, ScanNotFound
from services.core.quota.jobs import places
from services.core.quota.limits import Kind
from services.core.quota.usage import usage
from services.core.rpc.interceptors import CallInterceptor
from services.core.rpc.server import Registration
from services.core.runtime import Runtime
from services.core.state import Table
from services.ingest.assembly import Ingest
from services.ingest.config import IngestSettings
from services.ingest.keys import Seed
from services.scanner.config import ScannerSettings
from services.scanner.servicer import ScanServicer
from services.trainer.assembly import Trainer
from services.trainer.config import TrainerSettings
from tests.servers.ingest import KEY

DATASET = "projects/a/datasets/0123456789abcdef"


@dataclass
class House:
    """The services, and a client with the first operator's key."""

    runtime: Runtime
    addresses: Addresses
    client: AsyncCodegraft
    trainer: Trainer
    service_key: str
    """A reader's key of the settings: another service's."""

    async def until_known(self, owner: str, kind: Kind, limit: int | None) -> None:
        """Returns once the services know of a limit; they have 5 s for that."""
        async with asyncio.timeout(5):
            while self.runtime.quotas.limit(kind, owner) != limit:  # noqa: ASYNC110  # as a caller sees it
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def serving(runtime: Runtime, services: Sequence[Registration], gate: Gate | None) -> AsyncIterator[str]:
    """The services' address."""
    server = grpc.aio.server(interceptors=[CallInterceptor(gate, runtime.audit, runtime.quotas)])
    for add, servicer, _ in services:
        add(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield address
    finally:
        await server.stop(None)


@contextlib.asynccontextmanager
async def house(runtime: Runtime, cache: Path, model: str = "", inference: str = "") -> AsyncIterator[House]:
    """With the projects a and b.

    Args:
        model: of the trainer.
        inference: address of a replica.
    """
    settings = IngestSettings(cache_dir=cache, ingest_credential_keys=(KEY,))  # type: ignore[arg-type]
    ingest = Ingest(runtime, settings)
    root, service = ApiKey.new("root").text, ApiKey.new("trainer").text
    await ingest.keys.seed([Seed(key=root, role="operator"), Seed(key=service, role="reader")])  # type: ignore[arg-type]
    gate = Gate(Keyring(runtime.state(BUCKET)))
    training = TrainerSettings(cache_dir=cache, trainer_workers=0, **({"trainer_model": model} if model else {}))  # type: ignore[arg-type]
    trainer = Trainer(runtime, training, newest=None)  # type: ignore[arg-type]
    state = runtime.state("scanner")
    scans = Table(state, Scan, missing=ScanNotFound)
    room = places(runtime.quotas, Kind.SCANS, state, scans)
    datasets = Table(state, Dataset, missing=DatasetNotFound)
    servicer = ScanServicer(runtime, ScannerSettings(cache_dir=cache), scans, datasets, room)
    scanner = [
        (scan_pb2_grpc.add_ScanServiceServicer_to_server, servicer, "codegraft.scanner.v1.ScanService"),
        usage(runtime.quotas, {Kind.SCANS: room.used}),
    ]
    part = DatasetPart(files=1, bytes=100, tokens=25)
    manifest = DatasetManifest(name=DATASET, train=part, test=part)
    await runtime.artifacts.commit(DATASET, manifest, {"train.parquet": b"x" * 100})
    async with contextlib.AsyncExitStack() as stack:
        where = [
            await stack.enter_async_context(serving(runtime, services, gate))
            for services in (ingest.services, scanner, trainer.services)
        ]
        addresses = Addresses(*where, inference or where[0])
        tasks = [
            asyncio.create_task(work())
            for work in (gate.run, runtime.quotas.run, ingest.fetcher.run, ingest.storage.tell)
        ]
        try:
            async with AsyncCodegraft(addresses) as client:
                client = client.with_key(root)
                for project in ("a", "b"):
                    await client.projects.create(project)
                yield House(runtime, addresses, client, trainer, service)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
