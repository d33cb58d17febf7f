"""Streams under swaps, with cancels and deadlines: none is dropped, none is mixed, nothing is left.

``CHAOS_SECONDS=600`` makes it a test of two minutes (`make chaos`); the short one is part of every test run.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from codegraft.inference.v1 import completion_pb2 as pb
from codegraft.inference.v1.serving_pb2 import Split
from services.inference.engine.scheduler import Limits
from services.inference.policy import Best
from tests.contract.inference_world import PROJECT, Stream, World, until

pytest_plugins = ["tests.contract.inference_fixtures"]

SECONDS = float(os.environ.get("CHAOS_SECONDS", "40")) / 5
PAUSE = min(2.0, SECONDS / 16)
"""Seconds between two swaps."""
EDITORS = 6
TOKENS = 48
PREFIXES = ["def main():\n", "class A:\n    x = 1\n", "# a comment that many prompts begin with\ndef f(a):\n"]


@dataclass
class Seen:
    """What happened to the streams of all editors."""

    endings: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)


_HURRIED = {grpc.StatusCode.DEADLINE_EXCEEDED: "DEADLINE", grpc.StatusCode.RESOURCE_EXHAUSTED: "refused"}
"""How a stream in a hurry may end without text: out of time, or told at once that it would be."""


@pytest.mark.timeout(SECONDS + 120)
async def test_streams_under_swaps(worlds: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    limits = Limits(running=4, waiting=32, step_tokens=32, kv_tokens=8192)
    quiet: World = await worlds(limits=limits)
    bests = [await quiet.store(step, seed=step) for step in range(1, 6)]
    texts = {(best, prefix): await replay(quiet, best, prefix) for best in (None, *bests) for prefix in PREFIXES}
    assert len(set(texts.values())) == len(texts), "a text must tell its version"
    wanted = {(best.sha256 if best else "", prefix): text for (best, prefix), text in texts.items()}

    # Three places for five versions: some swaps have to wait, some versions come back from host memory.
    world: World = await worlds(runtime=quiet.runtime, limits=limits, inference_device_adapters=3)
    seen, done = Seen(), asyncio.Event()
    editors = [asyncio.create_task(edit(world, random.Random(n), wanted, seen, done)) for n in range(EDITORS)]
    swaps, clock = 0, asyncio.get_running_loop().time
    enough = clock() + SECONDS
    # A loaded machine needs more swaps until each version has answered.
    while clock() < enough or (len(seen.versions) <= len(bests) and clock() < enough + 60):
        await swap(world, swaps, bests)
        swaps += 1
        await asyncio.sleep(PAUSE)
        if broken := [editor for editor in editors if editor.done()]:
            await broken[0]  # raises what it saw
    done.set()
    await asyncio.gather(*editors)
    with capsys.disabled():
        print(f"\n{swaps} swaps, {sum(seen.endings.values())} streams on {len(seen.versions)} versions: {seen.endings}")

    assert set(seen.versions) == {"", *(best.sha256 for best in bests)}, "every version has answered"
    for ending in ("LENGTH", "cancelled"):
        assert seen.endings[ending], f"no stream ended by {ending}"
    assert seen.endings["DEADLINE"] + seen.endings["refused"], "no stream was in too much of a hurry"
    engine = world.replica.model.result().engine
    await until(lambda: engine.load == (0, 0) and world.replica.registry.streams(PROJECT) == {})
    assert engine.blocks_held == 0, "blocks of an ended stream are still held"
    assert all(holding.streams == 0 for holding in world.replica.registry.holdings())
    for best in (*bests, *bests):  # A, B, C ... A: what was kept of one version is never another's
        for prefix in PREFIXES[:1]:
            assert await replay(world, best, prefix) == texts[best, prefix]


async def replay(world: World, best: Best | None, prefix: str) -> str:
    """What a version writes when nothing else runs, in fp32 as the model is."""
    choice = pb.AdapterChoice(checkpoint=best.checkpoint) if best else pb.AdapterChoice(base=True)
    stream = await world.complete(prefix, TOKENS, adapter=choice).end()
    assert stream.started.adapter_sha256 == (best.sha256 if best else "")
    return stream.text


async def swap(world: World, number: int, bests: list[Best]) -> None:
    """Another policy each time: forward, back, to the base model, two at once, and as the trainer publishes it."""
    one, other = bests[number % 5], bests[(number + 1 + number % 4) % 5]
    match number % 6:
        case 0:
            world.peers.best_checkpoint = one
            await world.set("LATEST_BEST")
        case 1:
            await world.publish(other)
        case 2:
            await world.set("PINNED", one.checkpoint)
        case 3:
            await world.set("PINNED", bests[(number - 1) % 5].checkpoint)
        case 4:
            await world.set("PINNED", one.checkpoint, split=Split(checkpoint=other.checkpoint, percent=50))
        case 5:
            await world.set("OFF")


async def edit(
    world: World, rng: random.Random, wanted: dict[tuple[str, str], str], seen: Seen, done: asyncio.Event
) -> None:
    """One editor after the other completion, until the end: most wait, some go away, some are in a hurry."""
    while not done.is_set():
        prefix, mood = rng.choice(PREFIXES), rng.random()
        session = f"s-{rng.randrange(1000)}" if mood < 0.3 else ""
        timeout = rng.uniform(0.05, 0.3) if mood > 0.85 else 30.0
        stream = world.complete(prefix, TOKENS, timeout=timeout, session=session)
        try:
            if 0.7 < mood < 0.85:
                await leave(stream, rng)
                ending = "cancelled"
            else:
                ending = (await stream.end()).reason
        except grpc.aio.AioRpcError as error:
            assert timeout < 1 and error.code() in _HURRIED, error
            ending = _HURRIED[error.code()]
        assert ending in ("LENGTH", "END_OF_TEXT", "cancelled", "DEADLINE", "SUPERSEDED", "refused"), ending
        seen.endings[ending] += 1
        if stream.started is None:
            continue
        seen.versions[stream.started.adapter_sha256] += 1
        whole = wanted[stream.started.adapter_sha256, prefix]
        if ending in ("LENGTH", "END_OF_TEXT"):
            assert stream.text == whole, "a stream of mixed versions"
        else:
            assert whole.startswith(stream.text.rstrip("\N{REPLACEMENT CHARACTER}")), "a stream of mixed versions"


async def leave(stream: Stream, rng: random.Random) -> None:
    """Goes away in the middle of it."""
    await stream.begin()
    await asyncio.sleep(rng.uniform(0, 0.1))
    stream.call.cancel()
