"""Looks through clients' eyes, and into NATS and the object store themselves, whether every promise was kept."""

from __future__ import annotations

import asyncio
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from codegraft.common.v1.job_pb2 import JOB_STATE_CANCELLED, JOB_STATE_FAILED, JOB_STATE_SUCCEEDED, JobState
from codegraft.scanner.v1.dataset_pb2 import Dataset, DatasetManifest
from codegraft.scanner.v1.scan_pb2 import Scan
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from services.client.aio.client import AsyncCodegraft
from services.core.errors import CodegraftError, DatasetNotFound, ScanNotFound
from services.core.jobs import is_final
from services.core.models import adapter_files
from services.core.runtime import Runtime
from services.core.state import Table
from services.core.store.blobs import key
from services.ingest import listing
from services.ingest.listing import Listing
from services.ingest.records import Tables as IngestTables
from services.trainer.records import Tables as TrainerTables
from tests.chaos.ledger import Ledger, insist
from tests.chaos.stack import WholeStack

EXCUSES = ("its worker vanished", "NATS could not", "the S3 server at")
"""What a job may fail for: it met more faults than it has attempts, and says so."""


@dataclass
class Auditor:
    """Everything that is looked through. Each look raises AssertionError and names what is wrong."""

    client: AsyncCodegraft
    runtime: Runtime
    ledger: Ledger
    looked_at: Counter[str] = field(default_factory=Counter)
    """Artifacts that a client was told of, by kind."""
    lost: list[str] = field(default_factory=list)
    """Those of them that are not there, or are not what they were; and why."""

    @classmethod
    @asynccontextmanager
    async def of(cls, stack: WholeStack, client: AsyncCodegraft, ledger: Ledger) -> AsyncIterator[Auditor]:
        with tempfile.TemporaryDirectory() as cache:
            async with Runtime.open("auditor", stack.admin(Path(cache))) as runtime:
                yield cls(client, runtime, ledger)

    async def all(self) -> None:
        await self.jobs_ended()
        await self.nothing_is_lost()
        await self.nothing_came_twice()
        await self.references_hold()
        await self.nothing_is_left()

    async def jobs_ended(self) -> None:
        """Every job is in a final state, and what failed says that the faults were to blame."""
        for job in self.ledger.jobs:
            status = job.status
            assert is_final(status), f"{job.name} is {JobState.Name(status.state)}"
            assert status.state != JOB_STATE_CANCELLED, f"{job.name} was cancelled by nobody"
            if status.state == JOB_STATE_FAILED:
                assert status.failure.message.startswith(EXCUSES), f"{job.name} failed: {status.failure.message}"

    async def nothing_is_lost(self) -> None:
        """What a client was told is there, with the right digest. All of it is looked at, whatever is lost."""
        looks = {
            "projects": (self.ledger.projects, self.client.projects.get),
            "uploads": (self.ledger.uploads, self._upload),
            "sources": (self.ledger.sources, self._source),
            "snapshots": (self.ledger.snapshots, self._snapshot),
            "datasets": (self._done("scanner"), self._dataset),
            "adapters": (self._done("trainer"), self._adapter),
        }
        for kind, (names, look) in looks.items():
            for name in names:
                self.looked_at[kind] += 1
                try:
                    await look(name)
                except (AssertionError, CodegraftError) as error:
                    self.lost.append(f"{name}: {error}")
        assert not self.lost, self.lost

    def _done(self, worker: str) -> list[str]:
        jobs = [job for job in self.ledger.jobs if job.worker == worker]
        return [job.name for job in jobs if job.status.state == JOB_STATE_SUCCEEDED]

    async def _upload(self, name: str) -> None:
        content = self.ledger.uploads[name]
        sha256 = hashlib.sha256(content).hexdigest()
        assert name.endswith(sha256) and await self.runtime.blobs.get(sha256) == content, name

    async def _source(self, name: str) -> None:
        digest, source = self.ledger.sources[name], await self.client.sources.get(name)
        assert source.content_digest == digest, f"it has the content {source.content_digest}, not {digest}"
        stored = Listing.from_parquet(await self.runtime.store.get(listing.key(name, digest)))
        assert stored.digest == digest, "its listing is damaged"

    async def _snapshot(self, name: str) -> None:
        found = await self.client.snapshots.get(name)
        assert len([one async for one in self.client.snapshots.files(name)]) == found.file_count, name

    async def _dataset(self, scan: str) -> None:
        made = await self.client.datasets.get((await self.client.scans.get(scan)).dataset)
        manifest = await self.runtime.artifacts.manifest(made.name, DatasetManifest)
        assert manifest.digest == made.digest, f"{made.name} has another digest"
        for file in manifest.files:
            content = await self.runtime.blobs.get(file.sha256)
            assert hashlib.sha256(content).hexdigest() == file.sha256, f"{file.path} of {made.name} is damaged"

    async def _adapter(self, name: str) -> None:
        run = await self.client.runs.get(name)
        if not run.best_checkpoint:
            return
        best = await self.client.runs.checkpoint(run.best_checkpoint)
        with tempfile.TemporaryDirectory() as folder:
            to = Path(folder) / "adapter"
            await self.client.adapters.download(best.name, to)
            assert await asyncio.to_thread(adapter_files.version, to) == best.sha256, best.name

    async def nothing_came_twice(self) -> None:
        """One job for one request, one dataset for one scan, one best checkpoint of one run."""
        for job in self.ledger.jobs:
            assert await insist(job.ask_again) == job.name, f"{job.name} was made again"
        scans = await Table(self.runtime.state("scanner"), Scan, missing=ScanNotFound).all()
        runs = await TrainerTables.of(self.runtime.state("trainer")).runs.all()
        for request_id, count in Counter(each.request_id for each in (*scans, *runs)).items():
            assert count == 1, f"{count} jobs for the request {request_id}"
        datasets = await Table(self.runtime.state("scanner"), Dataset, missing=DatasetNotFound).all()
        made = {scan.dataset for scan in scans if scan.status.state == JOB_STATE_SUCCEEDED}
        assert made <= {dataset.name for dataset in datasets}
        for scan in scans:
            theirs = [dataset.name for dataset in datasets if dataset.scan == scan.name]
            assert len(theirs) <= 1, f"{scan.name} made {theirs}"
        checkpoints = await TrainerTables.of(self.runtime.state("trainer")).checkpoints.all()
        for run in runs:
            bests = [each.name for each in checkpoints if each.best and each.name.startswith(f"{run.name}/")]
            assert bests == ([run.best_checkpoint] if run.best_checkpoint else []), f"{run.name}: {bests}"

    async def references_hold(self) -> None:
        """Every file that a manifest names is in the store, whole; every record has its manifest."""
        manifests = [name async for name in self.runtime.store.list("projects/") if name.endswith("/manifest.json")]
        for name in manifests:
            for file in json.loads(await self.runtime.store.get(name)).get("files", []):
                size = await self.runtime.store.size(key(file["sha256"]))
                assert size == int(file.get("size", 0)), f"{name} names {file['path']}, of which {size} bytes are there"
        tables = TrainerTables.of(self.runtime.state("trainer"))
        for checkpoint in await tables.checkpoints.all():
            manifest = await self.runtime.artifacts.manifest(checkpoint.name, AdapterManifest)
            assert manifest.sha256 == checkpoint.sha256, checkpoint.name
        records = await IngestTables.of(self.runtime.state("ingest")).snapshots.all()
        datasets = await Table(self.runtime.state("scanner"), Dataset, missing=DatasetNotFound).all()
        for record in (*records, *datasets):
            assert f"{record.name}/manifest.json" in manifests, f"{record.name} has no manifest"

    async def nothing_is_left(self) -> None:
        """No part of a scan that succeeded, but what a worker made too late; garbage collection takes that."""
        scans = await Table(self.runtime.state("scanner"), Scan, missing=ScanNotFound).all()
        clean = {scan.name for scan in scans if scan.status.state == JOB_STATE_SUCCEEDED and scan.status.attempt == 1}
        left = [name async for name in self.runtime.store.list("projects/") if "/parts/" in name]
        assert not [name for name in left if name.partition("/parts/")[0] in clean], left
