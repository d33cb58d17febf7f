"""Many editors typing at once, through the real gateway and the real engine over a tiny model; bench/sessions.py is the
same with the whole stack and two hundred of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from bench.typists import Ask, Office, replayed, type_all
from services.gateway.figures import ACTIVE
from services.inference.engine.scheduler import Limits
from tests.contract.gateway_world import Gateway
from tests.contract.inference_world import PROJECT, until

pytest_plugins = ["tests.contract.gateway_fixtures"]


async def test_editors_that_type_get_their_own_answers_and_leave_nothing_behind(
    worlds: Callable[..., Any], gateways: Callable[..., Any]
) -> None:
    # Few places and a short queue: most requests are superseded, hung up on or refused.
    world = await worlds(limits=Limits(running=3, waiting=6, step_tokens=64, kv_tokens=4096))
    gateway: Gateway = await gateways(world)
    office = Office(int(gateway.url.rpartition(":")[2]), "", "demo", tokens=12)
    typing = await type_all(office, sessions=24, keys_a_second=8, seconds=3, patience=60)

    assert typing.faults() == []
    outcomes = typing.outcomes()
    assert set(outcomes) <= {"whole", "superseded", "hung up", "429 QUEUE_FULL"}, outcomes
    assert outcomes["hung up"] and outcomes["superseded"], "else it was no load"
    hanging = {ask.session for ask in typing.asks if ask.outcome == "hung up"}
    assert hanging <= set(range(0, 24, 2)), "only those who hang up"

    engine = world.replica.model.result().engine
    await until(lambda: not any(engine.look(lambda it: (len(it.running), len(it.waiting), it.blocks.held))))
    await until(lambda: world.replica.registry.streams(PROJECT) == {} and ACTIVE._value.get() == 0)

    others: list[tuple[Ask, Ask]] = []
    sample = random.Random(0).sample(typing.whole(), 24)
    await replayed(office, sample, lambda ask, again: others.append((ask, again)))
    assert others == []
    assert len({(ask.session, ask.text) for ask in sample}) > 12, "answers that are all alike would prove nothing"
