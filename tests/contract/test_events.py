"""One suite for every event bus, the fake and the NATS stream."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from codegraft.trainer.v1.run_pb2 import Run
from services.core import errors, log
from services.core.events import Event, EventBus, MemoryBus
from services.core.events.nats import STREAM, NatsBus
from services.core.nats_connection import connect
from services.core.telemetry import tracing
from tests.listening import first_of

if TYPE_CHECKING:
    from tests.conftest import NatsServer

CHANGED = "codegraft.trainer.run.changed.v1"
BEST = "codegraft.trainer.checkpoint.best.v1"
TRACE = "ab" * 16


@pytest.fixture(params=["memory", "nats"])
async def bus(request: pytest.FixtureRequest) -> AsyncIterator[EventBus]:
    if request.param == "memory":
        yield MemoryBus("codegraft/trainer")
        return
    server: NatsServer = request.getfixturevalue("nats_server")
    connection = await connect(server.url, user=server.user, password=server.password)
    yield NatsBus(connection, "codegraft/trainer")
    await connection.close()


class Follower:
    """A subscription that is running before anything else happens."""

    def __init__(self, events: AsyncIterator[Event], first: asyncio.Future[Event]) -> None:
        self._events = events
        self._next = first

    async def next(self) -> Event:
        event = await asyncio.wait_for(self._next, 30)
        self._next = asyncio.ensure_future(anext(self._events))
        return event

    async def silent(self, seconds: float = 0.3) -> bool:
        """Whether no event comes for so long."""
        done, _ = await asyncio.wait({self._next}, timeout=seconds)
        return not done

    async def close(self) -> None:
        self._next.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._next
        await self._events.aclose()  # type: ignore[attr-defined]


async def following(bus: EventBus, *types: str, durable: str = "") -> Follower:
    events = bus.subscribe(*types, durable=durable)
    if durable:  # it begins with the oldest event, whenever it begins
        return Follower(events, asyncio.ensure_future(anext(events)))
    return Follower(events, await first_of(bus, events))


def new_id() -> str:
    return uuid.uuid4().hex


async def test_an_event_arrives_as_it_was_sent(bus: EventBus) -> None:
    follower = await following(bus, CHANGED)
    run = Run(name="projects/p/runs/ü", title='100 %\n"x"')
    id = f"projects/p/runs/r@{new_id()} ü%"
    with log.bound(request_id="req-1 é\r\nNats-Msg-Id: x"), tracing.under(f"00-{TRACE}-{'cd' * 8}-01"):
        await bus.publish(CHANGED, run.name, run, id=id)
    event = await follower.next()
    assert (event.id, event.type, event.source, event.subject) == (id, CHANGED, "codegraft/trainer", run.name)
    assert event.request_id == "req-1 é\r\nNats-Msg-Id: x"
    assert event.traceparent.split("-")[1] == TRACE
    assert abs(datetime.now(UTC) - event.time) < timedelta(seconds=10)
    assert event.unpack(Run) == run
    await follower.close()


async def test_the_same_id_is_the_same_event(bus: EventBus) -> None:
    follower = await following(bus, CHANGED)
    same, other = new_id(), new_id()
    for id in (same, same, other):
        await bus.publish(CHANGED, "projects/p", Run(), id=id)
    assert [(await follower.next()).id, (await follower.next()).id] == [same, other]
    assert await follower.silent()
    await follower.close()


async def test_only_the_wanted_types_come(bus: EventBus) -> None:
    best, everything = await following(bus, BEST), await following(bus)
    ids = [new_id(), new_id(), new_id()]
    for id, type in zip(ids, (CHANGED, BEST, CHANGED), strict=True):
        await bus.publish(type, "projects/p", Run(), id=id)
    assert (await best.next()).id == ids[1]
    assert await best.silent()
    assert [(await everything.next()).id for _ in ids] == ids
    await best.close()
    await everything.close()


async def test_an_ephemeral_subscriber_sees_nothing_from_before(bus: EventBus) -> None:
    await bus.publish(CHANGED, "projects/p", Run(), id=new_id())
    follower = await following(bus, CHANGED)
    assert await follower.silent()
    await follower.close()


async def test_a_durable_subscriber_goes_on_where_it_was(bus: EventBus) -> None:
    durable, type = f"d-{new_id()}", f"codegraft.test.t{new_id()}.v1"
    ids = [new_id() for _ in range(4)]
    await bus.publish(type, "projects/p", Run(), id=ids[0])
    first = await following(bus, type, durable=durable)
    for id in ids[1:3]:
        await bus.publish(type, "projects/p", Run(), id=id)
    assert [(await first.next()).id, (await first.next()).id] == ids[:2]
    assert not await first.silent(20)  # it has got the third, so the second is acknowledged
    await first.close()
    await bus.publish(type, "projects/p", Run(), id=ids[3])
    second = await following(bus, type, durable=durable)
    assert [(await second.next()).id, (await second.next()).id] == ids[2:]  # the third was never acknowledged
    await second.close()


async def test_subscribers_of_one_name_share(bus: EventBus) -> None:
    durable, type = f"d-{new_id()}", f"codegraft.test.t{new_id()}.v1"
    seen: list[str] = []

    async def follow() -> None:
        async for event in bus.subscribe(type, durable=durable):
            seen.append(event.id)
            await asyncio.sleep(0.01)

    followers = [asyncio.create_task(follow()) for _ in range(2)]
    ids = {new_id() for _ in range(20)}
    for id in ids:
        await bus.publish(type, "projects/p", Run(), id=id)
    async with asyncio.timeout(30):
        while len(seen) < len(ids):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    await asyncio.sleep(0.2)
    assert sorted(seen) == sorted(ids)
    for follower in followers:
        follower.cancel()
    await asyncio.gather(*followers, return_exceptions=True)


@pytest.mark.parametrize("type", ["", "other.thing.v1", "codegraft.>", "codegraft.a b", "codegraft..v1", "codegraft"])
async def test_bad_types_are_refused(bus: EventBus, type: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        await bus.publish(type, "projects/p", Run(), id=new_id())
    with pytest.raises(errors.InvalidArgument):
        await anext(bus.subscribe(type))


def test_foreign_data_is_no_message() -> None:
    event = Event("1", CHANGED, "s", "projects/p", datetime.now(UTC), b"\xff\xff\xff")
    with pytest.raises(errors.InvalidArgument, match="Run"):
        event.unpack(Run)


# --- the real server only ---------------------------------------------------------------------------------------------


async def test_what_others_publish_is_stepped_over(nats_server: NatsServer) -> None:
    connection = await connect(nats_server.url, user=nats_server.user, password=nats_server.password)
    bus = NatsBus(connection, "codegraft/trainer")
    follower = await following(bus, CHANGED)
    await connection.js.publish(CHANGED, b"no headers at all")
    id = new_id()
    await bus.publish(CHANGED, "projects/p", Run(), id=id)
    assert (await follower.next()).id == id
    await follower.close()
    await connection.close()


async def test_headers_are_cloudevents(nats_server: NatsServer) -> None:
    connection = await connect(nats_server.url, user=nats_server.user, password=nats_server.password)
    await NatsBus(connection, "codegraft/trainer").publish(BEST, "projects/p/runs/r", Run(), id=(id := new_id()))
    stored = await connection.js.get_last_msg(STREAM, BEST)
    assert stored.headers is not None
    assert stored.headers.pop("ce-time").endswith("Z")
    assert stored.headers == {
        "ce-specversion": "1.0",
        "ce-id": id,
        "ce-type": BEST,
        "ce-source": "codegraft/trainer",
        "ce-subject": "projects/p/runs/r",
        "ce-datacontenttype": "application/protobuf",
        "ce-dataschema": "codegraft.trainer.v1.Run",
        "Nats-Msg-Id": id,
    }
    await connection.close()


async def test_subscriptions_survive_a_restart(own_nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # One that is under way over a restart is answered by nobody, and takes all its time.
    monkeypatch.setattr("services.core.events.nats._FETCH_SECONDS", 1.0)
    connection = await connect(own_nats_server.url, user=own_nats_server.user, password=own_nats_server.password)
    bus = NatsBus(connection, "codegraft/trainer")
    followers = [await following(bus, CHANGED), await following(bus, CHANGED, durable="d")]
    await bus.publish(CHANGED, "projects/p", Run(), id="1")
    assert [(await follower.next()).id for follower in followers] == ["1", "1"]
    await asyncio.sleep(0.1)
    own_nats_server.stop()
    await asyncio.sleep(0.5)
    own_nats_server.start()
    async with asyncio.timeout(20):
        while not connection.client.is_connected:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await bus.publish(CHANGED, "projects/p", Run(), id="1")  # ids outlive the restart, too
    await bus.publish(CHANGED, "projects/p", Run(), id="2")
    assert [(await follower.next()).id for follower in followers] == ["2", "2"]
    for follower in followers:
        await follower.close()
    await connection.close()
