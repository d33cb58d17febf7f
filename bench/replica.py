"""One real inference process for benchmarks, with NATS and S3; the benchmark itself answers as ingest and trainer."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import torch
from safetensors.torch import save

from bench.servers import servers
from codegraft.event.v1.events_pb2 import BestCheckpointChanged
from codegraft.inference.v1 import completion_pb2 as pb
from codegraft.inference.v1 import completion_pb2_grpc, serving_pb2_grpc
from codegraft.ingest.v1 import project_pb2, project_pb2_grpc
from codegraft.trainer.v1 import run_pb2, run_pb2_grpc
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest, Checkpoint
from services.cli.local import ports
from services.cli.local.process import Child, tail
from services.cli.local.stack import waiting
from services.core import errors, log
from services.core.config import CoreSettings
from services.core.models import catalogue, weights
from services.core.models.adapter_files import CONFIG, WEIGHTS, linear_layers
from services.core.rpc.client import OPTIONS
from services.core.rpc.interceptors import CallInterceptor
from services.core.runtime import Runtime

PROJECT, RUN = "projects/bench", "projects/bench/runs/one"
BEST = "codegraft.trainer.checkpoint.best.v1"
RANK = 16
SPEC = catalogue.find("")
_GRACE = timedelta(seconds=15)
_START = 120.0
"""Seconds until which the process has to answer."""


def model_folder() -> Path:
    """The local model, brought here before anything is measured."""
    return weights.ensure_weights(SPEC, Path.home() / ".cache" / "codegraft")


@dataclass
class Peers(run_pb2_grpc.RunServiceServicer, project_pb2_grpc.ProjectServiceServicer):
    """Ingest, in which every project exists, and the trainer, as far as inference asks them."""

    best: Checkpoint | None = None

    async def GetProject(self, request: Any, context: Any) -> Any:
        return project_pb2.GetProjectResponse(project=project_pb2.Project(name=request.name))

    async def GetBestCheckpoint(self, request: Any, context: Any) -> Any:
        if self.best is None:
            raise errors.CheckpointNotFound("no run has a checkpoint")
        return run_pb2.GetBestCheckpointResponse(checkpoint=self.best)

    async def KeepCheckpoint(self, request: Any, context: Any) -> Any:
        return run_pb2.KeepCheckpointResponse(checkpoint=Checkpoint(name=request.name, kept=True))


@dataclass
class Replica:
    """What runs."""

    folder: Path
    address: str
    child: Child
    runtime: Runtime
    """The benchmark's own, on the same servers."""
    peers: Peers
    completions: Any
    serving: Any
    model: Path
    spawned: float
    """When the process was started, on the monotonic clock."""
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)

    async def ready(self) -> float:
        """Waits until a completion is answered; seconds since the start of the process."""
        deadline = time.monotonic() + _START
        while True:
            try:
                await ended(self.complete("x = 1\n", 1))
                return time.monotonic() - self.spawned
            except grpc.aio.AioRpcError as error:
                if time.monotonic() > deadline or self.child.exit_code() is not None:
                    raise SystemExit(f"{error.details()}\n{tail(self.child.log)}") from None
            await asyncio.sleep(0.05)

    def complete(self, prefix: str, max_tokens: int, *, timeout: float = 60.0, **fields: Any) -> Any:
        """Begins a completion: an asynchronous iterator of its parts."""
        fields = {"parent": PROJECT, "stop": pb.StopRule(max_tokens=max_tokens), **fields}
        prompt = pb.CodePrompt(path="bench.py", prefix=prefix, suffix=fields.pop("suffix", ""))
        return self.completions.Complete(pb.CompleteRequest(prompt=prompt, **fields), timeout=timeout)

    async def store(self, step: int) -> Checkpoint:
        """Commits a random adapter of rank 16 on all linear layers, in bfloat16, as the trainer does."""
        self.layers = self.layers or linear_layers(self.model)
        generator = torch.Generator().manual_seed(step)
        tensors = {}
        for path, (out, width) in self.layers.items():
            name = f"base_model.model.{path}.lora_"
            tensors[name + "A.weight"] = (torch.randn(RANK, width, generator=generator) * 0.02).bfloat16()
            tensors[name + "B.weight"] = (torch.randn(out, RANK, generator=generator) * 0.02).bfloat16()
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none", "task_type": "CAUSAL_LM"}
        config["target_modules"] = sorted({path.rpartition(".")[2] for path in self.layers})
        data, name = save(tensors), f"{RUN}/checkpoints/{step}"
        made = Checkpoint(
            name=name,
            step=step,
            sha256=hashlib.sha256(data).hexdigest(),
            test_loss=2.0 - step / 1000,
            base_model=SPEC.id,
            base_digest=weights.base_digest(self.model),
        )
        manifest = AdapterManifest(
            name=name, sha256=made.sha256, base_model=SPEC.id, base_digest=made.base_digest, lora_r=RANK
        )
        await self.runtime.artifacts.commit(name, manifest, {WEIGHTS: data, CONFIG: json.dumps(config).encode()})
        return made

    async def publish(self, checkpoint: Checkpoint) -> float:
        """The trainer has a new best checkpoint; when the event went out, on the monotonic clock."""
        self.peers.best = checkpoint
        event = BestCheckpointChanged(
            checkpoint=checkpoint.name,
            sha256=checkpoint.sha256,
            base_model=checkpoint.base_model,
            base_digest=checkpoint.base_digest,
            test_loss=checkpoint.test_loss,
        )
        began = time.monotonic()
        await self.runtime.events.publish(BEST, checkpoint.name, event, id=f"{checkpoint.name}-{time.time_ns()}")
        return began

    def resident(self) -> float:
        """Memory of the process, MB."""
        text = Path(f"/proc/{self.child.pid}/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0]) / 1000

    async def stop(self) -> None:
        """Ends the process; what it writes at its end is there afterwards."""
        await asyncio.to_thread(self.child.stop, _GRACE)


async def ended(call: Any) -> tuple[Any, Any, int]:
    """Started, Finished and the number of tokens of a completion."""
    started, finished, tokens = None, None, 0
    async for response in call:
        match response.WhichOneof("part"):
            case "started":
                started = response.started
            case "delta":
                tokens += response.delta.tokens
            case "finished":
                finished = response.finished
    return started, finished, tokens


@asynccontextmanager
async def replica(module: str = "services.inference", **settings: str) -> AsyncIterator[Replica]:
    """Starts everything in a temporary folder and ends it all.

    Args:
        module: what runs as the service.
        settings: environment variables of it.
    """
    log.configure("bench", "warning")
    model, peers = model_folder(), Peers()  # type: ignore[abstract]  # what a replica asks, and nothing else
    with tempfile.TemporaryDirectory(prefix="codegraft-bench-") as name, servers(Path(name)) as (found, _):
        folder = Path(name)
        (folder / "cache").mkdir()
        (folder / "cache" / "models").symlink_to(model.parent)
        chosen = ports.choose(["inference", "peers"], {})
        address, beside = (f"{ports.HOST}:{chosen[one]}" for one in ("inference", "peers"))
        environment = {
            **waiting("inference"),
            **found,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
            "CODEGRAFT_LISTEN": address,
            "CODEGRAFT_CACHE_DIR": str(folder / "cache"),
            "CODEGRAFT_INGEST_ADDRESS": beside,
            "CODEGRAFT_TRAINER_ADDRESS": beside,
            **settings,
        }
        core: dict[str, Any] = {
            name: environment[variable]
            for name in CoreSettings.model_fields
            if (variable := _variable(name)) in environment
        }
        spawned = time.monotonic()
        # Before any gRPC of this process: its threads do not survive a fork.
        child = Child.start(
            "inference", [sys.executable, "-m", module], log=folder / "log", env=environment, cwd=folder
        )
        server = grpc.aio.server(interceptors=[CallInterceptor()])
        project_pb2_grpc.add_ProjectServiceServicer_to_server(peers, server)
        run_pb2_grpc.add_RunServiceServicer_to_server(peers, server)
        server.add_insecure_port(beside)
        try:
            await server.start()
            async with (
                Runtime.open("bench", CoreSettings(**core)) as runtime,
                grpc.aio.insecure_channel(address, options=OPTIONS) as channel,
            ):
                completions = completion_pb2_grpc.CompletionServiceStub(channel)
                serving = serving_pb2_grpc.ServingServiceStub(channel)
                yield Replica(folder, address, child, runtime, peers, completions, serving, model, spawned)
        finally:
            await server.stop(0)
            await asyncio.to_thread(child.stop, _GRACE)


def _variable(setting: str) -> str:
    return f"CODEGRAFT_{setting.upper()}"
