"""Light work on a whole stack: people who add sources, scan and train, and editors that complete all the time."""

from __future__ import annotations

import asyncio
import random
import secrets
from dataclasses import dataclass
from typing import Any

from codegraft.common.v1.job_pb2 import JOB_STATE_SUCCEEDED
from codegraft.common.v1.split_pb2 import SPLIT_TEST, SPLIT_TRAIN, Split
from codegraft.ingest.v1.source_pb2 import FileSource, Source
from codegraft.scanner.v1.scan_pb2 import ScanSettings
from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters
from services.client.aio.caller import new_request_id
from services.client.aio.client import AsyncCodegraft
from services.core.errors import CodegraftError, DeadlineExceeded, QueueFull, Unavailable
from tests.chaos.ledger import Job, Ledger, insist

LOOK = 0.25
"""Seconds between two looks at a job."""
SCAN = ScanSettings(max_loss=1000, min_tokens=4)
QUICK: dict[str, Any] = {
    "learning_rate": 2e-2,
    "train_steps": 24,
    "eval_steps": 8,
    "checkpoint_steps": 8,
    "batch_size": 4,
    "micro_batch_size": 2,
    "context_length": 64,
    "lora_r": 4,
    "early_stopping_patience": 0,
    "max_eval_tokens": 256,
}


def code(rng: random.Random, functions: int = 30) -> bytes:
    """A Python file that nobody has written before."""
    words = ["left", "right", "total", "count", "value", "index", "rest", "key"]
    lines = []
    for number in range(functions):
        a, b, c = rng.sample(words, 3)
        lines.append(f"def {a}_{b}_{rng.randrange(10**6)}({c}):\n    return {c} * {number} + {rng.randrange(9)}\n\n")
    return "".join(lines).encode()


@dataclass
class Person:
    """Takes one project after the other from its sources to an adapter."""

    client: AsyncCodegraft
    ledger: Ledger
    rng: random.Random
    name: str

    @classmethod
    def new(cls, client: AsyncCodegraft, ledger: Ledger) -> Person:
        """One whose projects have no other's names."""
        return cls(client, ledger, random.Random(), f"person-{secrets.token_hex(4)}")

    async def work(self, enough: asyncio.Event) -> None:
        """Begins nothing new once it is enough, and returns when all that was begun has ended."""
        number = 0
        while not enough.is_set():
            await self.project(f"{self.name}-{number}")
            number += 1

    async def project(self, id: str) -> None:
        """One project, from its sources to its end."""
        project = await self.create(id)
        await self.add(project, "code", SPLIT_TRAIN)
        await self.add(project, "test", SPLIT_TEST)
        snapshot = await self.snapshot(project)
        scan = await self.scan(project, snapshot)
        await self.follow(scan)
        if scan.status.state == JOB_STATE_SUCCEEDED:
            await self.follow(await self.train(project, QUICK))

    async def create(self, id: str) -> str:
        client, request_id = self.client, new_request_id()
        project = await insist(lambda: client.projects.create(id, request_id=request_id))
        self.ledger.projects.append(project.name)
        return project.name

    async def add(self, project: str, id: str, split: Split = SPLIT_TRAIN) -> str:
        """Adds a file, and waits until it is stored."""
        client, request_id, content = self.client, new_request_id(), code(self.rng)
        upload = await insist(lambda: client.sources.upload(project, content))
        self.ledger.uploads[upload.name] = content
        source = Source(file=FileSource(upload=upload.name, path=f"{id}.py"), split=split)
        added = await insist(lambda: client.sources.add(project, source, source_id=id, request_id=request_id))
        self.ledger.sources[added.name] = ""
        self.ledger.sources[added.name] = (await insist(lambda: client.sources.wait(added.name))).content_digest
        return added.name

    async def snapshot(self, project: str) -> str:
        taken = await insist(lambda: self.client.snapshots.create(project))
        self.ledger.snapshots.append(taken.name)
        return taken.name

    async def scan(self, project: str, snapshot: str) -> Job:
        request_id = new_request_id()

        async def ask() -> str:
            return (await self.client.scans.create(project, snapshot, SCAN, request_id=request_id)).name

        return await self._begun("scanner", request_id, ask)

    async def train(self, project: str, hyperparameters: dict[str, Any]) -> Job:
        request_id, dataset = new_request_id(), await insist(lambda: self._newest(project))

        async def ask() -> str:
            wanted = Hyperparameters(**hyperparameters)
            return (await self.client.runs.create(project, wanted, dataset=dataset, request_id=request_id)).name

        return await self._begun("trainer", request_id, ask)

    async def follow(self, job: Job) -> None:
        """Returns once it has ended. Looks at it instead of watching: what is told after a restart counts, too."""
        look: Any = self.client.scans.get if job.worker == "scanner" else self.client.runs.get
        while True:
            if job.see((await insist(lambda: look(job.name))).status):
                return
            await asyncio.sleep(LOOK)

    async def _newest(self, project: str) -> str:
        return (await self.client.datasets.get(f"{project}/datasets/latest")).name

    async def _begun(self, worker: str, request_id: str, ask: Any) -> Job:
        job = Job(await insist(ask), worker, request_id, ask)
        self.ledger.jobs.append(job)
        return job


async def edit(client: AsyncCodegraft, ledger: Ledger, project: str, enough: asyncio.Event) -> None:
    """Completes all the time. A completion may break off, but says why in a word."""
    while not enough.is_set():
        try:
            async for _ in client.completions.complete(project, prefix="def total(left):\n", max_tokens=24, timeout=20):
                pass
            ledger.completions += 1
            await asyncio.sleep(0.05)
        except (Unavailable, DeadlineExceeded, QueueFull) as error:
            _count(ledger, error)
            await asyncio.sleep(0.2)


def _count(ledger: Ledger, error: CodegraftError) -> None:
    ledger.broken[error.reason] = ledger.broken.get(error.reason, 0) + 1
