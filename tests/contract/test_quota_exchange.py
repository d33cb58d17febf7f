"""Rates over several processes, with the real NATS between them: one limit for all, and none that hangs on NATS."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from services.core.errors import QuotaExceeded
from services.core.nats_connection import NatsConnection, connect
from services.core.quota.exchange import INTERVAL
from services.core.quota.limits import Defaults
from services.core.quota.nats import NatsChannel
from services.core.quota.quotas import Quotas
from services.core.quota.rates import MUCH
from services.core.state import MemoryState
from tests.conftest import NatsServer

LIMIT = 600
PROMPTLY = 10.0
"""Seconds: not a bound that is promised, but no limit that is used up would have come back by then."""


@pytest.fixture
def owner() -> str:
    """A project that no other test knows."""
    return f"projects/{uuid.uuid4().hex[:8]}"


class Replica:
    """One process's quotas, over a connection of its own."""

    def __init__(self, connection: NatsConnection, limit: int) -> None:
        self.connection = connection
        self.quotas = Quotas(
            MemoryState(), Defaults(tokens_per_minute=limit), channel=NatsChannel(connection, "inference")
        )
        self.running = asyncio.create_task(self.quotas.run())

    def used(self, owner: str) -> int:
        return self.quotas.tokens.used(owner) or 0

    def passes(self, owner: str, amount: int = 1) -> bool:
        try:
            self.quotas.tokens.take([owner], amount)
        except QuotaExceeded:
            return False
        return True


@contextlib.asynccontextmanager
async def replicas(server: NatsServer, count: int, limit: int = LIMIT) -> AsyncIterator[list[Replica]]:
    login = {"user": server.user, "password": server.password}
    those = [Replica(await connect(server.url, **login), limit) for _ in range(count)]  # type: ignore[arg-type]
    try:
        await asyncio.sleep(0.05)
        yield those
    finally:
        for each in those:
            each.running.cancel()
            await asyncio.gather(each.running, return_exceptions=True)
            await each.connection.close()


async def until(true: Callable[[], bool], seconds: float = PROMPTLY) -> None:
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110  # as a caller sees it
            await asyncio.sleep(0.002)


async def burst(those: Sequence[Replica], owner: str) -> tuple[int, float]:
    """What passes of a client that sends as fast as it can, to all in turn, and how much of it had come back."""
    began, passed = time.monotonic(), 0
    while time.monotonic() - began < 1.5:
        passed += sum(5 for each in those if each.passes(owner, 5))
        await asyncio.sleep(0.001)
    return passed, LIMIT * (time.monotonic() - began) / 60


async def test_three_replicas_have_one_limit(nats_server: NatsServer, owner: str) -> None:
    """What passes too much is what was not told yet."""
    async with replicas(nats_server, 3) as those:
        # Within a round of messages, 20 ms and what this machine takes, each of two others may have let in more. It
        # stands still at times, with messages on their way: the best of some bursts counts.
        for attempt in range(4):
            passed, back = await burst(those, mine := f"{owner}-{attempt}")
            assert passed >= LIMIT, passed
            if passed <= LIMIT * (1 + 4 * MUCH) + back + 2 * 5 * 60:
                break
        else:
            pytest.fail(f"{passed} passed, with a limit of {LIMIT}")
        ended = time.monotonic()
        await until(lambda: max(found := [each.used(mine) for each in those]) - min(found) <= 1)
        left = passed - back - LIMIT * (time.monotonic() - ended) / 60
        assert all(abs(each.used(mine) - left) < 0.02 * LIMIT + 5 for each in those)


async def test_who_comes_later_knows_and_who_stays_alone_too(nats_server: NatsServer, owner: str) -> None:
    async with replicas(nats_server, 1) as (first,):
        assert first.passes(owner, 500)  # of which 10 a second come back
        async with replicas(nats_server, 1) as (second,):
            await until(lambda: second.used(owner) > 400)
            assert not second.passes(owner, 200) and second.passes(owner, 80)
            await until(lambda: first.used(owner) > 500)
            assert not first.passes(owner, 100)
        assert not first.passes(owner, 200)


async def test_a_killed_process_leaves_what_it_used_for_as_long_as_anybody(nats_server: NatsServer, owner: str) -> None:
    async with replicas(nats_server, 1, 3000) as (here,):
        told = (nats_server.url, nats_server.user, nats_server.password, owner, "3000")
        there = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.contract.quota_process",
            *told,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert there.stdin is not None and there.stdout is not None
        there.stdin.write(b"250\n")
        assert int(await there.stdout.readline()) == 250
        await until(lambda: here.used(owner) > 0)
        there.kill()
        await there.wait()
        assert here.used(owner) > 0
        await until(lambda: here.used(owner) == 0, 20)  # of 3,000 a minute 250 are back after 5 s


async def test_without_nats_each_counts_alone_and_afterwards_together_again(
    own_nats_server: NatsServer, owner: str
) -> None:
    async with replicas(own_nats_server, 2) as (here, there):
        assert here.passes(owner, 100)
        await until(lambda: there.used(owner) > 0)
        own_nats_server.stop()
        assert here.passes(owner, 400) and not here.passes(owner, 400)
        assert there.passes(owner, 400), "nobody told it"
        took = []
        for _ in range(5):
            began = time.monotonic()
            assert there.passes(owner, 1) and here.passes(owner, 1)
            took.append(time.monotonic() - began)
        assert min(took) < 0.1, "no call waits for NATS"
        await asyncio.sleep(INTERVAL)
        own_nats_server.start()
        await until(lambda: here.connection.client.is_connected and there.connection.client.is_connected, 10)
        assert here.passes(owner, 20)
        await until(lambda: abs(here.used(owner) - there.used(owner)) <= 1)
        assert there.used(owner) < LIMIT, "what was used alone is not laid upon each other"
        late = here.used(owner)
        assert there.passes(owner, 40)  # which come back within 4 s
        await until(lambda: here.used(owner) > late)
