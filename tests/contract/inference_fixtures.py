"""Fixtures over inference_world.py. They come with ``pytest_plugins``: only tests that want them import torch."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from codegraft.inference.v1 import completion_pb2_grpc, serving_pb2_grpc
from services.core.events import EventBus
from services.core.models.catalogue import find
from services.core.rpc.interceptors import CallInterceptor
from services.core.runtime import Runtime
from services.inference import model as inference_model
from services.inference.assembly import Replica
from services.inference.config import InferenceSettings
from services.inference.engine.scheduler import Limits
from tests import published
from tests.contract.inference_world import DIGEST, PROJECT, Peers, World
from tests.unit.inference import tiny


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    torch.set_num_threads(1)
    return tiny.make_tokenizer()


@pytest.fixture(scope="module")
def reference(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return tiny.make_model(tokenizer)


@pytest.fixture
async def worlds(
    reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> AsyncIterator[Callable[..., Any]]:
    """Starts replicas; several may share one runtime."""
    running: list[Callable[[], Any]] = []
    buses: list[EventBus] = []

    async def make(
        runtime: Runtime | None = None, peers: Peers | None = None, hold: Any = None, **fields: Any
    ) -> World:
        runtime, peers = runtime or Runtime.memory(), peers or Peers()
        limits = fields.pop("limits", Limits(running=4, waiting=4, step_tokens=32, kv_tokens=8192))
        options = {"inference_reconcile_seconds": 60, "inference_replica": "r1", "cache_dir": tmp_path}
        settings = InferenceSettings(**{"inference_device_adapters": 2, **options, **fields})

        def load() -> inference_model.LoadedModel:
            if hold is not None:
                hold.wait(20)
            return inference_model.start(copy.deepcopy(reference), tokenizer, "tiny", DIGEST, limits, max_rank=8)

        replica = Replica(runtime, settings, find("smollm2-135m"), bests=peers, projects=peers, load=load)
        server = grpc.aio.server(interceptors=[CallInterceptor(audit=runtime.audit, quotas=runtime.quotas)])
        for add, servicer, _ in replica.services:
            add(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        task = asyncio.create_task(replica.run())
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        if hold is None:
            await asyncio.wait_for(asyncio.shield(replica.model), 20)
            await asyncio.sleep(0.05)  # the follower subscribes

        async def stop() -> None:
            if hold is not None:
                hold.set()
            await channel.close()
            await server.stop(0)
            if not replica.model.done():
                await asyncio.wait([replica.model], timeout=10)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            replica.stop()
            assert replica.registry.streams(PROJECT) == {}, "a stream still holds its version"

        running.append(stop)
        buses.append(runtime.events)
        completions = completion_pb2_grpc.CompletionServiceStub(channel)
        serving = serving_pb2_grpc.ServingServiceStub(channel)
        return World(runtime, peers, replica, completions, serving, reference, f"127.0.0.1:{port}")

    yield make
    for stop in running:
        await stop()
    published.check("inference", buses)


@pytest.fixture
async def world(worlds: Callable[..., Any]) -> World:
    made: World = await worlds()
    return made
