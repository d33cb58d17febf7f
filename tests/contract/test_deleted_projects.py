"""What inference lets go when a project is deleted: at every replica, in the state and in the store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from codegraft.common.v1.deleted_pb2 import DeletedProject
from codegraft.inference.v1 import completion_pb2, feedback_pb2, feedback_pb2_grpc, serving_pb2
from services.core.auth.keyring import BUCKET
from services.core.leftovers import deleted_projects
from tests.contract.inference_world import PROJECT, until

pytest_plugins = ["tests.contract.inference_fixtures"]


async def test_a_deleted_projects_policy_copy_and_counts_go_at_every_replica(worlds: Callable[..., Any]) -> None:
    """A replica that comes back later does it, too, and a new project of that name begins with the base model."""
    world = await worlds()
    other = await worlds(runtime=world.runtime, inference_replica="r2")
    mirror = asyncio.create_task(world.replica.mirror.run())
    best = await world.store(1, seed=1)
    await world.set("PINNED", best.checkpoint)
    for each in (world, other):
        await each.until_active(best.sha256)
    stream = await (world.complete()).begin()
    feedback = feedback_pb2_grpc.FeedbackServiceStub(grpc.aio.insecure_channel(world.address))
    shown = feedback_pb2.RecordFeedbackRequest(
        parent=PROJECT, completion_id=stream.started.completion_id, event="FEEDBACK_EVENT_SHOWN"
    )
    await feedback.RecordFeedback(shown)
    await stream.end()
    asked = feedback_pb2.GetAcceptanceRequest(parent=PROJECT)
    assert len((await feedback.GetAcceptance(asked)).adapters) == 1
    sent = {"prefix": "secret = 'of the one before'\n" * 2, "adapter": completion_pb2.AdapterChoice(base=True)}
    assert [(await world.complete(**sent).end()).started.cached_tokens for _ in range(2)] == [0, 48]
    copy_of = f"records/inference/Serving/{PROJECT}/serving.json"
    await eventually(lambda: world.runtime.store.stat(copy_of))
    deleted = deleted_projects(world.runtime.state(BUCKET))
    await deleted.create(DeletedProject(name=PROJECT))
    for each in (world, other):
        await until(lambda each=each: each.replica.registry.route(PROJECT).main is None)  # type: ignore[misc]
    await eventually(lambda: gone(world.runtime.store.stat(copy_of)))
    await eventually(lambda: no_counts(feedback, asked))
    serving = (await world.serving.GetServing(serving_pb2.GetServingRequest(parent=PROJECT))).serving
    assert (serving.mode, serving.etag, len(serving.history)) == (serving_pb2.SERVING_MODE_LATEST_BEST, "", 0)
    assert (await (world.complete()).end()).started.adapter_sha256 == ""
    assert (await world.complete(**sent).end()).started.cached_tokens == 0, "which would tell what was sent before"
    await world.set("OFF")  # by the new project
    moment = DeletedProject(name=PROJECT)
    moment.successor_create_time.GetCurrentTime()
    await deleted.mutate(PROJECT, lambda record: record.MergeFrom(moment))
    late = await worlds(runtime=world.runtime, inference_replica="r3")
    await asyncio.sleep(0.1)
    status = await late.status()
    assert status.serving.mode == serving_pb2.SERVING_MODE_OFF, "what the successor has set stays"
    mirror.cancel()


async def eventually(found: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not await found():  # noqa: ASYNC110  # as a client sees it
            await asyncio.sleep(0.01)


async def gone(stat: Any) -> bool:
    return await stat is None


async def no_counts(feedback: Any, asked: Any) -> bool:
    return not (await feedback.GetAcceptance(asked)).adapters
