"""The real service process is killed, and cut off from NATS and from the store: it serves on, and finds back by itself.

``CHAOS_SECONDS=600`` makes outages of a minute (`make chaos`); short ones are part of every test run.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from codegraft.inference.v1.serving_pb2 import SERVING_MODE_PINNED, Serving
from services.cli.local import ports
from services.core import errors, nats_connection
from services.core.errors import ServingNotFound
from services.core.rpc.status import from_rpc
from services.core.runtime import Runtime
from services.core.state import Table
from services.inference.policy import Choice, Policies, set_mode
from tests.chaos.house import House, Nursery, opened
from tests.conftest import NatsServer, S3Server, standing_on

OUTAGE = float(os.environ.get("CHAOS_SECONDS", "25")) / 10
LONG = 0.9 * nats_connection.REQUEST_TIMEOUT
"""Seconds: a completion that waits for NATS takes more. A machine that stands still for a second makes none so long."""

pytestmark = pytest.mark.timeout(OUTAGE + 120)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()  # before any channel: it is forked
    yield made
    made.close()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def house(nursery: Nursery, nats_of_file: NatsServer, s3: S3Server, tmp_path: Path) -> AsyncIterator[House]:
    settings = standing_on(nats_of_file, s3.address, tmp_path / "cache")
    async with opened(nursery, settings, tmp_path, CODEGRAFT_INFERENCE_RECONCILE_SECONDS="1") as made:
        yield made


@dataclass
class Editor:
    """Completes all the time."""

    house: House
    project: str
    versions: list[str] = field(default_factory=list)
    longest: float = 0.0
    """Seconds."""

    async def work(self) -> None:
        while True:
            began = time.monotonic()
            self.versions.append(await self.house.answered_by(self.project))  # raises what ends it
            self.longest = max(self.longest, time.monotonic() - began)
            await asyncio.sleep(0.02)


@asynccontextmanager
async def editing(house: House) -> AsyncIterator[dict[str, Editor]]:
    """An editor of each project; none of its completions may fail."""
    editors = {project: Editor(house, project) for project in (house.one, house.two)}
    tasks = [asyncio.create_task(editor.work()) for editor in editors.values()]
    try:
        yield editors
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends


async def test_killed_it_serves_the_wanted_version_again(house: House) -> None:
    followed, best = await house.commit(house.one, 1)
    chosen, pinned = await house.commit(house.two, 1)
    await house.commit(house.two, 2)
    await house.until_answered_by(house.one, best)
    await house.set(house.two, "PINNED", chosen)
    await house.until_answered_by(house.two, pinned)
    await house.until_held(chosen)
    await house.until_held(followed)
    running = await house.complete(house.one, tokens=220).begin()
    house.kill()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.end()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await house.peers.stop(0)  # nobody tells it anything
    house.start()
    # Already the first ones: a replica that answers is at its policies.
    assert await asyncio.gather(house.answered_by(house.one), house.answered_by(house.two)) == [best, pinned]


async def test_a_nats_outage(house: House, nats_of_file: NatsServer) -> None:
    _, before = await house.commit(house.one, 1)
    chosen, other = await house.commit(house.two, 1)
    _, newer = await house.commit(house.two, 2)
    await house.until_answered_by(house.one, before)
    await house.until_answered_by(house.two, newer)
    nats_of_file.stop()
    async with editing(house) as editors:
        over = time.monotonic() + OUTAGE
        best = await behind_its_back(house, nats_of_file, chosen, other)
        await asyncio.sleep(max(0.0, over - time.monotonic()))
        assert set(editors[house.one].versions) == {before} and set(editors[house.two].versions) == {newer}
        assert max(editor.longest for editor in editors.values()) < LONG, "they waited for somebody"
        nats_of_file.start()
        await house.until_answered_by(house.one, best)
        await house.until_answered_by(house.two, other)


async def behind_its_back(house: House, server: NatsServer, checkpoint: str, sha256: str) -> str:
    """What others do meanwhile: a new best of one project, the other one's policy; SHA-256 of the best.

    They reach the same server, on a port that the service does not know.
    """
    hidden = dataclasses.replace(server, port=ports.choose(["nats"], {})["nats"], child=None)
    hidden.start()
    try:
        async with Runtime.open("others", house.settings.model_copy(update={"nats_url": hidden.url})) as runtime:
            _, best = await house.commit(house.one, 5, runtime=runtime)
            await pin(runtime, house.two, checkpoint, sha256)
    finally:
        hidden.stop()
    return best


async def pin(runtime: Runtime, project: str, checkpoint: str, sha256: str) -> None:
    """Sets a policy as another replica does."""
    policies = Policies(Table(runtime.state("inference"), Serving, missing=ServingNotFound))
    choice = Choice(checkpoint, sha256)
    await policies.change(project, lambda serving: set_mode(serving, SERVING_MODE_PINNED, choice, None, None))


async def test_a_store_outage(house: House, s3: S3Server) -> None:
    _, before = await house.commit(house.one, 1)
    better, best = await house.commit(house.one, 2, best=False)
    first, oldest = await house.commit(house.two, 1)
    await house.until_answered_by(house.one, before)
    await house.until_answered_by(house.two, oldest)
    _, newer = await house.commit(house.two, 2)
    third, unseen = await house.commit(house.two, 3, best=False)
    await house.until_answered_by(house.two, newer)
    async with editing(house) as editors:
        over = time.monotonic() + OUTAGE
        s3.kill()
        await house.make_best(better)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await house.set(house.two, "PINNED", third)
        assert type(from_rpc(caught.value)) is errors.StoreUnavailable
        await house.set(house.two, "PINNED", first)  # the way back needs no store
        assert await house.answered_by(house.two) == oldest
        await pin(house.runtime, house.two, third, unseen)
        await asyncio.sleep(max(0.0, over - time.monotonic()))
        assert set(editors[house.one].versions) == {before} and set(editors[house.two].versions) == {newer, oldest}
        assert max(editor.longest for editor in editors.values()) < LONG, "they waited for somebody"
        s3.start()
        await house.until_answered_by(house.one, best)
        await house.until_answered_by(house.two, unseen)
