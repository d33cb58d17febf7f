"""A replica of the inference service for tests: real gRPC, real engine over a tiny model, fakes of NATS and the store.

Its fixtures are in inference_fixtures.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import save
from transformers import LlamaForCausalLM

from codegraft.event.v1 import events_pb2
from codegraft.inference.v1 import completion_pb2 as pb
from codegraft.inference.v1 import serving_pb2
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from services.core import errors
from services.core.rpc.status import from_rpc
from services.core.runtime import Runtime
from services.core.store import blobs
from services.inference.adapters import lora
from services.inference.adapters.verify import CONFIG, WEIGHTS
from services.inference.assembly import Replica
from services.inference.policy import Best

BEST = "codegraft.trainer.checkpoint.best.v1"
PROJECT, RUN = "projects/demo", "projects/demo/runs/one"
DIGEST = "d" * 64


@dataclass
class Peers:
    """Ingest and the trainer, as far as inference asks them."""

    best_checkpoint: Best | None = None
    down: bool = False
    asked: int = 0
    kept: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    keeps: bool = False
    unsaid: bool = False
    """Whether ingest is away, so that any project may be there."""

    async def exists(self, project: str) -> bool:
        return project != "projects/none"

    def confirmed(self, project: str) -> bool:
        return not self.unsaid

    def forget(self, project: str) -> None:
        pass

    async def kept_since(self, project: str) -> float | None:
        return 0.0 if self.keeps else None

    async def best(self, project: str, base_model: str) -> Best | None:
        self.asked += 1
        if self.down:
            raise errors.Unavailable("no trainer")
        return self.best_checkpoint

    async def keep(self, checkpoint: str) -> None:
        if self.down:
            raise errors.Unavailable("no trainer")
        self.kept.append(checkpoint)

    async def hold(self, checkpoint: str, time: timedelta) -> None:
        if self.down:
            raise errors.Unavailable("no trainer")
        assert time > timedelta(hours=1)
        self.held.append(checkpoint)


@dataclass
class Stream:
    """One completion, as its caller sees it."""

    call: Any
    started: Any = None
    text: str = ""
    finished: Any = None

    async def begin(self) -> Stream:
        async for response in self.call:
            self._take(response)
            if self.started is not None:
                break
        return self

    async def end(self) -> Stream:
        async for response in self.call:
            self._take(response)
        return self

    def _take(self, response: Any) -> None:
        match response.WhichOneof("part"):
            case "started":
                assert self.started is None and not self.text
                self.started = response.started
            case "delta":
                assert self.started is not None and self.finished is None
                self.text += response.delta.text
            case "finished":
                self.finished = response.finished

    @property
    def reason(self) -> str:
        return str(pb.FinishReason.Name(self.finished.reason)).removeprefix("FINISH_REASON_")


@dataclass
class World:
    """A replica under test with everything around it."""

    runtime: Runtime
    peers: Peers
    replica: Replica
    completions: Any
    serving: Any
    reference: LlamaForCausalLM
    address: str
    adapters: dict[str, bytes] = field(default_factory=dict)

    def complete(self, prefix: str = "def main():\n", max_tokens: int = 24, **fields: Any) -> Stream:
        timeout = fields.pop("timeout", 20)
        parent = fields.pop("parent", PROJECT)
        stop = fields.pop("stop", None) or pb.StopRule(max_tokens=max_tokens)
        prompt = fields.pop("prompt", None) or pb.CodePrompt(path="a.py", prefix=prefix)
        request = pb.CompleteRequest(parent=parent, prompt=prompt, stop=stop, **fields)
        return Stream(self.completions.Complete(request, timeout=timeout))

    async def store(
        self, step: int, seed: int, change: Callable[[dict[str, Any]], None] | None = None, run: str = RUN
    ) -> Best:
        """Commits an adapter as the trainer does; ``change`` spoils it first."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for path, (out, width) in lora.adaptable(self.reference).items():
            name = f"base_model.model.{path}.lora_"
            tensors[name + "A.weight"] = torch.randn(4, width, generator=generator) * 0.2
            tensors[name + "B.weight"] = torch.randn(out, 4, generator=generator) * 0.2
        parts: dict[str, Any] = {
            "tensors": tensors,
            "config": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"},
            "base_digest": DIGEST,
            "lora_r": 4,
            "sha256": None,
            "extra": {},
            "dataset": "",
            "dataset_digest": "",
            "probe": None,
        }
        if change:
            change(parts)
        data = parts.get("data") or save(parts["tensors"])
        sha256 = parts["sha256"] or hashlib.sha256(data).hexdigest()
        name = f"{run}/checkpoints/{step}"
        manifest = AdapterManifest(
            name=name,
            sha256=sha256,
            base_model="tiny",
            base_digest=parts["base_digest"],
            lora_r=parts["lora_r"],
            dataset=parts["dataset"],
            dataset_digest=parts["dataset_digest"],
            probe=parts["probe"],
        )
        files = {WEIGHTS: data, CONFIG: json.dumps(parts["config"]).encode(), **parts["extra"]}
        await self.runtime.artifacts.commit(name, manifest, files)
        blob = blobs.key(manifest.files[1].sha256)
        if "stored" in parts:  # what the store holds since then instead of the weights
            await self.runtime.store.delete(blob)
            if parts["stored"]:
                await self.runtime.store.put(blob, parts["stored"])
        return Best(name, sha256, "tiny", parts["base_digest"], 2.0 - step / 1000)

    async def publish(self, best: Best) -> None:
        """The trainer has a new best checkpoint."""
        self.peers.best_checkpoint = best
        event = events_pb2.BestCheckpointChanged(
            checkpoint=best.checkpoint,
            sha256=best.sha256,
            base_model=best.base_model,
            base_digest=best.base_digest,
            test_loss=best.test_loss or 0.0,
        )
        await self.runtime.events.publish(BEST, best.checkpoint, event, id=f"{best.checkpoint}-{time.time_ns()}")

    async def set(self, mode: str, checkpoint: str = "", parent: str = PROJECT, **fields: Any) -> Any:
        request = serving_pb2.SetServingRequest(
            parent=parent, mode=f"SERVING_MODE_{mode}", checkpoint=checkpoint, **fields
        )
        return (await self.serving.SetServing(request)).serving

    async def status(self) -> Any:
        return await self.serving.GetServing(serving_pb2.GetServingRequest(parent=PROJECT))

    async def until_active(self, sha256: str) -> None:
        await until(lambda: (v := self.replica.registry.route(PROJECT).main) is not None and v.sha256 == sha256)

    @contextlib.contextmanager
    def unhurried(self, seconds: float = 0.05) -> Iterator[None]:
        """Each step of the engine takes so long at least: the longest text is under way for ten seconds."""
        runner = self.replica.model.result().engine._runner
        step = runner.step

        def slow(work: Any) -> Any:
            time.sleep(seconds)
            return step(work)

        runner.step = slow  # type: ignore[method-assign]
        try:
            yield
        finally:
            runner.step = step  # type: ignore[method-assign]

    def told(self, type: str) -> list[Any]:
        return [event for event in self.runtime.events.published if event.type == type]  # type: ignore[attr-defined]


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.005)


async def in_time(attempt: Callable[[float], Awaitable[bool]]) -> None:
    """Has something tried with a second, and with more where the machine stood still for that time.

    Args:
        attempt: says whether it went as it should.
    """
    for seconds in (1, 1.5, 2, 2.5, 3):
        if await attempt(seconds):
            return
    raise AssertionError("it did not go as it should with any time")


async def refused(stream: Stream) -> errors.CodegraftError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.end()
    return from_rpc(caught.value)


async def refused_call(call: Any) -> errors.CodegraftError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc(caught.value)
