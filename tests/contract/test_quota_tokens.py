"""Tokens a minute, where completions take them, and what an editor sees of a quota that is used up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
import openai
import pytest

from codegraft.access.v1 import quota_pb2
from codegraft.access.v1.quota_pb2_grpc import UsageServiceStub
from codegraft.inference.v1 import completion_pb2 as pb
from services.core import errors
from services.core.quota.limits import Defaults
from services.core.runtime import Runtime
from tests.contract.inference_world import PROJECT, World, refused, refused_call

pytest_plugins = ["tests.contract.gateway_fixtures"]


async def limited(worlds: Callable[..., Any], tokens: int) -> World:
    made: World = await worlds(runtime=Runtime.memory(quota_project=Defaults(tokens_per_minute=tokens)))
    return made


def used(world: World) -> int:
    return world.runtime.quotas.tokens.used(PROJECT) or 0


async def test_a_completion_pays_for_its_prompt_and_what_was_generated(worlds: Callable[..., Any]) -> None:
    world = await limited(worlds, 600)
    began = time.monotonic()

    def back() -> float:
        """At most so many of them have come back."""
        return 10 * (time.monotonic() - began) + 1

    stream = await world.complete(max_tokens=24).begin()
    most = stream.started.prompt_tokens + 24
    assert most - back() < used(world) <= most, "let in with the most that it may take"
    await stream.end()
    usage = stream.finished.usage
    taken = usage.prompt_tokens + usage.completion_tokens
    assert taken - back() < used(world) <= taken <= most
    request = quota_pb2.GetUsageRequest(name=f"{PROJECT}/quota")
    async with grpc.aio.insecure_channel(world.address) as channel:
        told = (await UsageServiceStub(channel).GetUsage(request)).used
    assert told.HasField("tokens_per_minute") and not told.HasField("requests_per_minute")


async def test_what_was_not_generated_comes_back(worlds: Callable[..., Any]) -> None:
    world = await limited(worlds, 300)  # of which 5 a second come back by themselves
    with world.unhurried(0.03):
        stream = await world.complete(max_tokens=200).begin()
        assert used(world) > 150
        assert (await refused(world.complete(max_tokens=200))).reason == "QUOTA_EXCEEDED", "it may still be needed"
        stream.call.cancel()
    async with asyncio.timeout(10):
        while used(world) > 80:  # noqa: ASYNC110  # nobody tells when a cancelled call has ended
            await asyncio.sleep(0.005)
    await world.complete(max_tokens=200).end()


async def test_over_the_limit_is_refused_with_the_time_and_several_answers_cost_more(
    worlds: Callable[..., Any],
) -> None:
    world = await limited(worlds, 60)
    await world.complete(max_tokens=24).end()
    error = await refused(world.complete(max_tokens=24, sampling=pb.Sampling(n=4)))
    assert isinstance(error, errors.QuotaExceeded)
    assert error.metadata["quota"] == "tokens_per_minute" and error.metadata["owner"] == PROJECT
    assert 10 < (error.retry_after or 0) <= 60
    await world.complete(max_tokens=24, parent="projects/other").end()
    score = pb.ScoreRequest(parent=PROJECT, prompt=pb.CodePrompt(prefix="x = 1\n" * 9), continuation="y = 2\n" * 9)
    assert (await refused_call(world.completions.Score(score))).reason == "QUOTA_EXCEEDED"


async def test_a_completion_that_never_got_a_place_costs_nothing(worlds: Callable[..., Any]) -> None:
    world = await limited(worlds, 60)  # of which one a second comes back by itself
    error = await refused(
        world.complete(prompt=pb.CodePrompt(prefix="x"), adapter=pb.AdapterChoice(base=True), timeout=0.001)
    )
    assert error.reason == "DEADLINE_EXCEEDED"
    await asyncio.sleep(0.05)
    async with asyncio.timeout(5):
        while used(world):  # noqa: ASYNC110  # nobody tells when a call that is out of time has ended
            await asyncio.sleep(0.005)


async def test_an_editor_gets_429_with_the_time(worlds: Callable[..., Any], gateways: Callable[..., Any]) -> None:
    gateway = await gateways(await limited(worlds, 60))
    body = {"model": "demo", "prompt": "def main():\n", "path": "a.py", "max_tokens": 24}
    assert (await gateway.post("/v1/completions", body)).status_code == 200
    for stream in (False, True):
        answer = await gateway.post("/v1/completions", {**body, "max_tokens": 60, "stream": stream})
        assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.headers["x-ratelimit-limit-tokens"] == "60"
        assert answer.headers["x-ratelimit-remaining-tokens"] == "0"
        assert float(answer.headers["x-ratelimit-reset-tokens"].rstrip("s")) <= 60
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "QUOTA_EXCEEDED")
        assert "tokens a minute" in error["message"]
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(model="demo", prompt="x", max_tokens=60, extra_body={"path": "a.py"})
