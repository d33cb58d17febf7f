"""Places for what lasts: two calls at once, at two replicas, never get the last one. Over the fake and JetStream KV."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from types import SimpleNamespace

import pytest

from codegraft.access.v1.quota_pb2 import StoredPlaces
from services.core.errors import QuotaExceeded, StateUnavailable
from services.core.nats_connection import connect
from services.core.quota import places as module
from services.core.quota.limits import Defaults, Kind
from services.core.quota.places import Places
from services.core.quota.quotas import Quotas
from services.core.state import MemoryState, StateStore
from services.core.state.nats import NatsState

THREE = Defaults(runs=3)


@pytest.fixture(params=["memory", "nats"])
async def state(request: pytest.FixtureRequest) -> AsyncIterator[StateStore]:
    if request.param == "memory":
        yield MemoryState()
        return
    server = request.getfixturevalue("nats_server")
    connection = await connect(server.url, user=server.user, password=server.password)
    yield NatsState(connection, f"places-{uuid.uuid4().hex[:8]}")
    await connection.close()


class Replica:
    """One process; all of a test share the records."""

    def __init__(self, state: StateStore, records: dict[str, int], **more: timedelta) -> None:
        self.records, self.slow = records, 0.0

        async def used(owner: str, there: StoredPlaces) -> dict[str, int]:
            found = dict(records)
            await asyncio.sleep(self.slow)
            return found

        async def retry(owner: str) -> float:
            return 7.0

        self.places = Places(Quotas(MemoryState(), THREE, THREE), Kind.RUNS, state, used, retry=retry, **more)

    async def create(self, name: str, amount: int = 1, owners: tuple[str, ...] = ("projects/p",)) -> bool:
        try:
            async with self.places.claim(owners, name, amount):
                await asyncio.sleep(self.slow)
                self.records[name] = amount
        except QuotaExceeded:
            return False
        return True


class Away:
    """A state store that cannot be reached now and then."""

    def __init__(self, state: StateStore) -> None:
        self._state, self.away = state, False

    def __getattr__(self, operation: str) -> object:
        if self.away:
            raise StateUnavailable("away")
        return getattr(self._state, operation)


async def test_of_many_at_once_as_many_pass_as_there_are_places(state: StateStore) -> None:
    records: dict[str, int] = {}
    replicas = [Replica(state, records) for _ in range(4)]
    for replica in replicas:
        replica.slow = 0.005
    passed = await asyncio.gather(*(replicas[n % 4].create(f"runs/{n}") for n in range(12)))
    assert sum(passed) == len(records) == 3
    assert not await replicas[0].create("runs/late")
    records.pop(next(iter(records)))
    assert await replicas[0].create("runs/late"), "claims of those that have records are gone"


async def test_a_refusal_says_when_there_may_be_room(state: StateStore) -> None:
    replica = Replica(state, {"runs/a": 1, "runs/b": 2})
    with pytest.raises(QuotaExceeded) as refused:
        async with replica.places.claim(["projects/p"], "runs/c", 1):
            raise AssertionError
    assert refused.value.metadata == {"quota": "runs", "owner": "projects/p", "limit": "3", "used": "3"}
    assert refused.value.retry_after == 7.0


async def test_what_has_its_room_keeps_it_and_more_is_asked_for(state: StateStore) -> None:
    replica = Replica(state, {"sources/a": 2, "sources/b": 2})
    assert await replica.create("sources/a", 2), "over the limit by now, but no more than before"
    assert await replica.create("sources/a", 1)
    assert not await replica.create("sources/b", 3)


async def test_a_failure_gives_the_place_back(state: StateStore) -> None:
    replica = Replica(state, {"runs/a": 1, "runs/b": 1})
    with pytest.raises(StateUnavailable):
        async with replica.places.claim(["projects/p", "keys/k"], "runs/c"):
            assert not await replica.create("runs/d")
            raise StateUnavailable("broken off")
    assert await replica.create("runs/d")


async def test_every_owner_has_to_have_room(state: StateStore) -> None:
    replica = Replica(state, {"runs/a": 1, "runs/b": 1})
    async with replica.places.claim(["keys/k", "issuer#some one/else"], "runs/c"):
        assert not await replica.create("runs/d", owners=("projects/p", "keys/k"))
        assert await replica.create("runs/d", owners=("projects/p",)), "its claim at the project was given back"


async def test_a_claim_whose_process_is_not_heard_ends_by_itself_and_is_there_again(
    state: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time_ns()
    monkeypatch.setattr(module, "time", SimpleNamespace(time_ns=lambda: now))  # how slow the machine is does not matter
    away = Away(state)
    cut, other = Replica(away, {}, lasts=timedelta(seconds=0.2)), Replica(state, {})  # type: ignore[arg-type]

    async def until_claimed(name: str) -> None:
        """Until a claim that was made or renewed now is there."""
        async with asyncio.timeout(10):
            while True:
                entry = await state.get("StoredPlaces/projects/p/runs")
                places = StoredPlaces.FromString((entry and entry.value) or b"").places
                ends = [each.expire_time.ToNanoseconds() for each in places if each.name == name]
                if ends == [now + 200_000_000]:
                    return
                await asyncio.sleep(0.005)

    async with cut.places.claim(["projects/p"], "runs/a", 2):
        now += 150_000_000
        await until_claimed("runs/a")
        now += 150_000_000
        assert not await other.create("runs/b", 2), "it lives"
        away.away = True
        now += 210_000_000
        async with other.places.claim(["projects/p"], "runs/b", 1):
            away.away = False
            await until_claimed("runs/a")
            assert not await other.create("runs/c", 1), "both count, as both come"
    assert await other.create("runs/c", 3)


async def test_two_that_store_the_same_thing_take_its_room_once(state: StateStore) -> None:
    first, second = Replica(state, {}), Replica(state, {})
    async with first.places.claim(["projects/p"], "uploads/u", 2):
        held = second.places.claim(["projects/p"], "uploads/u", 2)
        await held.__aenter__()
        assert not await second.create("uploads/v", 2) and await second.create("uploads/w", 1)
        second.records.clear()
        await held.__aexit__(None, None, None)
        assert not await second.create("uploads/v", 2), "the first still has it"
    assert await second.create("uploads/v", 2)
