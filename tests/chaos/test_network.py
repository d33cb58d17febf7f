"""A slow network only costs time; a cut or a dead one gives a clear error in time, and is forgotten once it is well."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import pytest

from services.client.aio.client import AsyncCodegraft
from services.core.errors import CodegraftError, DeadlineExceeded, StateUnavailable, StoreUnavailable, Unavailable
from tests.chaos.audit import Auditor
from tests.chaos.ledger import Ledger, insist
from tests.chaos.load import SCAN, Person
from tests.chaos.stack import WholeStack

PATIENCE = 8.0
"""Seconds that a call may take."""
RECOVERY = 20.0


@dataclass
class Case:
    """A way that is disturbed, what then fails, and with which errors."""

    way: tuple[str, str]
    call: Callable[[AsyncCodegraft], Awaitable[object]]
    error: type[CodegraftError] | tuple[type[CodegraftError], ...]


@pytest.fixture(autouse=True)
def mended(stack: WholeStack) -> Iterator[None]:
    yield
    for way in stack.ways.values():
        way.mend()


async def complete(client: AsyncCodegraft, project: str) -> str:
    pieces = client.completions.complete(project, prefix="a", max_tokens=4, timeout=PATIENCE)
    return "".join([piece.text async for piece in pieces])


@pytest.mark.parametrize("fault", ["cut", "stall"])
async def test_who_cannot_be_reached_is_named_in_time(stack: WholeStack, client: AsyncCodegraft, fault: str) -> None:
    ledger = Ledger()
    person = Person.new(client, ledger)
    project = await person.create(f"{person.name}-network")
    await person.add(project, "code")
    snapshot = await person.snapshot(project)
    nobody = Unavailable if fault == "cut" else DeadlineExceeded  # the service itself cannot say a word
    cases = [
        Case(("ingest", "nats"), lambda client: client.projects.get(project), StateUnavailable),
        Case(("scanner", "s3"), lambda client: client.scans.create(project, snapshot, SCAN), StoreUnavailable),
        Case(("", "trainer"), lambda client: client.models.get(), nobody),
        Case(("", "inference"), lambda client: complete(client, project), nobody),
    ]
    before = dict(stack.pids)
    for case in cases:  # of a new project inference asks ingest and the trainer, which are cut off in a moment
        await insist(lambda call=case.call: call(client))  # type: ignore[misc]  # its model may be loading
    await asyncio.gather(*(_disturbed(stack, client.with_timeout(PATIENCE), case, fault) for case in cases))
    assert stack.pids == before, "nobody was started again"
    async with Auditor.of(stack, client, ledger) as auditor:
        await auditor.nothing_is_lost()


async def _disturbed(stack: WholeStack, client: AsyncCodegraft, case: Case, fault: str) -> None:
    way = stack.ways[case.way]
    await asyncio.to_thread(way.cut if fault == "cut" else way.stall)
    for _ in range(3):
        began = time.monotonic()
        with pytest.raises(CodegraftError) as caught:
            await case.call(client)
        took = time.monotonic() - began
        # The service has the last tenth of the time to say it: a machine that stands still then takes the word from it.
        if isinstance(caught.value, case.error) and took < PATIENCE + 2:
            break
    assert isinstance(caught.value, case.error) and took < PATIENCE + 2, (case.way, caught.value, took)
    assert caught.value.message, case.way
    await asyncio.to_thread(way.mend)
    async with asyncio.timeout(RECOVERY):
        while True:
            try:
                await case.call(client)
                return
            except (Unavailable, DeadlineExceeded):
                await asyncio.sleep(0.1)


async def test_a_slow_network_only_costs_time(stack: WholeStack, client: AsyncCodegraft) -> None:
    for way in stack.ways.values():
        way.slow(latency=0.03, bandwidth=2 << 20)
    ledger = Ledger()
    person = Person.new(client, ledger)
    project = await person.create(f"{person.name}-slow")
    await client.sources.upload(project, os.urandom(1 << 20))
    await person.add(project, "code")
    await person.snapshot(project)
    assert await complete(client, project)
    async with Auditor.of(stack, client, ledger) as auditor:
        await auditor.all()
