"""A real inference process over real NATS and S3 servers, beside the real trainer's and ingest's answers.

Nothing trains: checkpoints are committed as the trainer's worker does it, by its own code.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
from safetensors.torch import load_file, save_file

from codegraft.inference.v1 import completion_pb2 as pb
from codegraft.inference.v1 import completion_pb2_grpc, serving_pb2, serving_pb2_grpc
from codegraft.ingest.v1 import project_pb2_grpc
from codegraft.ingest.v1.project_pb2 import Project
from codegraft.trainer.v1.run_pb2 import Run
from codegraft.trainer.v1.training_pb2 import CheckpointWritten, TrainingLoaded
from services.cli.local import ports
from services.core import names
from services.core.config import CoreSettings
from services.core.errors import ResourceExists
from services.core.jobs import JobContext, new_status
from services.core.jobs.states import claim
from services.core.models import adapter_files, weights
from services.core.rpc.interceptors import CallInterceptor
from services.core.runtime import Runtime
from services.ingest import records as ingest_records
from services.ingest.deletions import Deletions
from services.ingest.servicers.projects import ProjectServicer
from services.trainer.assembly import Trainer
from services.trainer.config import TrainerSettings
from services.trainer.records import BUCKET, Tables
from services.trainer.run.commit import Committer
from services.trainer.run.telling import Teller
from tests.contract.inference_world import Stream
from tests.unit.trainer.whole import make_adapter, make_base

RANK = 4


class Nursery:
    """Starts inference processes, one at a time, without the seconds of importing torch each."""

    def __init__(self) -> None:
        path = Path(__file__).with_name("inference_process.py")
        self._process = subprocess.Popen(
            [sys.executable, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin and self._process.stdout
        self._asks, self._answers = self._process.stdin, self._process.stdout
        self._child = 0

    def start(self, environment: dict[str, str]) -> None:
        while not self._child and (line := self._answers.readline().strip()) != "ready":
            assert line, "it ended"
        self._asks.write(json.dumps(environment) + "\n")
        self._asks.flush()
        self._child = int(self._answers.readline())

    def kill(self) -> None:
        os.kill(self._child, signal.SIGKILL)

    def close(self) -> None:
        self._process.kill()  # its own end takes seconds, of a process that has imported torch
        self._process.wait(10)
        self._asks.close()
        self._answers.close()


@dataclass
class House:
    """Everything, and what a test does with it."""

    settings: CoreSettings
    runtime: Runtime
    start: Callable[[], None]
    kill: Callable[[], None]
    """SIGKILL."""
    one: str
    two: str
    """Its projects."""
    base: Path
    folder: Path
    completions: Any
    serving: Any
    peers: grpc.aio.Server

    def complete(self, project: str, tokens: int = 8, **options: Any) -> Stream:
        request = pb.CompleteRequest(
            parent=project,
            prompt=pb.CodePrompt(path="a.py", prefix="def main():\n"),
            stop=pb.StopRule(max_tokens=tokens),
        )
        return Stream(self.completions.Complete(request, **{"timeout": 30, "wait_for_ready": True, **options}))

    async def answered_by(self, project: str) -> str:
        """SHA-256 of the version that answers."""
        return str((await self.complete(project).end()).started.adapter_sha256)

    async def until_answered_by(self, project: str, sha256: str, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while (found := await self.answered_by(project)) != sha256:
            assert time.monotonic() < deadline, f"still answered by {found or 'the base model'}"
            await asyncio.sleep(0.05)

    async def set(self, project: str, mode: str, checkpoint: str = "") -> Any:
        request = serving_pb2.SetServingRequest(parent=project, mode=f"SERVING_MODE_{mode}", checkpoint=checkpoint)
        return (await self.serving.SetServing(request, timeout=10)).serving

    async def commit(
        self, project: str, step: int, *, best: bool = True, runtime: Runtime | None = None
    ) -> tuple[str, str]:
        """Commits an adapter of the project's run, each with other weights, and tells of it; its name and SHA-256.

        Args:
            best: whether it is the run's new best one.
        """
        committer = await self._committer(project, runtime or self.runtime)
        folder = await asyncio.to_thread(self._adapter, f"{project} {step}")
        sha256 = adapter_files.version(folder)
        written = CheckpointWritten(
            step=step, test_loss=2.0 - step / 1000, best=best, adapter_path=str(folder), sha256=sha256, strength=1.0
        )
        await committer.commit(written)
        return f"{project}/runs/r/checkpoints/{step}", sha256

    async def until_held(self, checkpoint: str) -> None:
        """Until the trainer knows that the checkpoint serves."""
        checkpoints, deadline = Tables.of(self.runtime.state(BUCKET)).checkpoints, time.monotonic() + 20
        while not (await checkpoints.get(checkpoint)).HasField("hold_expire_time"):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)

    async def make_best(self, checkpoint: str) -> None:
        """A committed checkpoint is the best one of its run from now on: records and an event, nothing in the store."""
        record = await Tables.of(self.runtime.state(BUCKET)).checkpoints.get(checkpoint)
        committer = await self._committer(names.project_of(checkpoint), self.runtime)
        await committer._make_best(record, record.test_loss)

    async def _committer(self, project: str, runtime: Runtime) -> Committer:
        tables, name = Tables.of(runtime.state(BUCKET)), f"{project}/runs/r"
        run = Run(name=name, base_model=f"dir:{self.base}", base_test_loss=3.0, status=new_status())
        claim(run.status, "worker", timedelta(minutes=30))
        with contextlib.suppress(ResourceExists):
            await tables.runs.create(run)
        context = JobContext(tables.runs, await tables.runs.get(name), name)
        loaded = TrainingLoaded(base_digest=weights.base_digest(self.base))
        loaded.plan.hyperparameters.lora_r, loaded.plan.hyperparameters.lora_alpha = RANK, 2.0 * RANK
        teller = Teller(tables.story, runtime.events, context)
        return Committer(teller, tables.checkpoints, runtime.artifacts, runtime.storage, loaded, "")

    def _adapter(self, of: str) -> Path:
        """The adapter's weights, a little less of them for each next one."""
        folder = self.folder / of.replace("/", "-")
        first = self.folder / "first"
        if not first.is_dir():
            make_adapter(self.base, first, rank=RANK)
        folder.mkdir()
        (folder / adapter_files.CONFIG).write_bytes((first / adapter_files.CONFIG).read_bytes())
        strength = 1 - len(list(self.folder.iterdir())) / 100
        tensors = load_file(first / adapter_files.WEIGHTS)
        save_file({label: tensor * strength for label, tensor in tensors.items()}, folder / adapter_files.WEIGHTS)
        return folder


@asynccontextmanager
async def opened(nursery: Nursery, settings: CoreSettings, folder: Path, **options: str) -> AsyncIterator[House]:
    """A house on these servers, its service started; options are settings of the service."""
    base = make_base("llama", folder / "base")
    port, peer_port = ports.choose(["it", "peers"], {}).values()
    environment = {
        "CODEGRAFT_LISTEN": f"{ports.HOST}:{port}",
        "CODEGRAFT_NATS_URL": settings.nats_url,
        "CODEGRAFT_NATS_USER": settings.nats_user,
        "CODEGRAFT_NATS_PASSWORD": settings.nats_password.get_secret_value(),
        "CODEGRAFT_S3_ENDPOINT": settings.s3_endpoint,
        "CODEGRAFT_S3_ACCESS_KEY": settings.s3_access_key.get_secret_value(),
        "CODEGRAFT_S3_SECRET_KEY": settings.s3_secret_key.get_secret_value(),
        "CODEGRAFT_CACHE_DIR": str(folder / "cache"),
        "CODEGRAFT_TRAINER_ADDRESS": f"{ports.HOST}:{peer_port}",
        "CODEGRAFT_INGEST_ADDRESS": f"{ports.HOST}:{peer_port}",
        "CODEGRAFT_INFERENCE_MODEL": f"dir:{base}",
        "CODEGRAFT_INFERENCE_THREADS": "1",
        "CODEGRAFT_INFERENCE_KV_TOKENS": "8192",
        "CODEGRAFT_INFERENCE_PROMPT_TOKENS": "256",
        **options,
    }
    (folder / "adapters").mkdir()
    nursery.start(environment)
    try:
        async with Runtime.open("test", settings) as runtime:
            one, two = (f"projects/{name}-{secrets.token_hex(4)}" for name in ("one", "two"))
            peers = await _peers(runtime, base, folder, peer_port, one, two)
            # A client that finds its replica again at once, as one behind a load balancer does.
            often = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100)]
            async with grpc.aio.insecure_channel(f"{ports.HOST}:{port}", options=often) as channel:
                yield House(
                    settings,
                    runtime,
                    lambda: nursery.start(environment),
                    nursery.kill,
                    one,
                    two,
                    base,
                    folder / "adapters",
                    completion_pb2_grpc.CompletionServiceStub(channel),
                    serving_pb2_grpc.ServingServiceStub(channel),
                    peers,
                )
            await peers.stop(0)
    finally:
        nursery.kill()


async def _peers(runtime: Runtime, base: Path, folder: Path, port: int, *projects: str) -> grpc.aio.Server:
    """The trainer's and ingest's own answers to what inference asks them."""
    settings = TrainerSettings(trainer_model=f"dir:{base}", cache_dir=folder / "cache", trainer_workers=0)
    tables = ingest_records.Tables.of(runtime.state(ingest_records.BUCKET))
    for name in projects:
        await tables.projects.create(Project(name=name))
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    for add, servicer, _ in Trainer(runtime, settings, newest=None).services:  # type: ignore[arg-type]
        add(servicer, server)
    ingest = ProjectServicer(tables, runtime.events, Deletions(runtime, tables))
    project_pb2_grpc.add_ProjectServiceServicer_to_server(ingest, server)
    server.add_insecure_port(f"{ports.HOST}:{port}")
    await server.start()
    return server
