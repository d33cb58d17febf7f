"""One suite for every state store: what the fake promises, JetStream KV must keep, and the other way round."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import nats.errors
import pytest

from codegraft.common.v1.job_pb2 import JobStatus
from codegraft.ingest.v1.project_pb2 import Project
from codegraft.trainer.v1.run_pb2 import Run
from services.core import errors
from services.core.nats_connection import LONGEST_SUBJECT, NatsConnection, connect
from services.core.state import Entry, MemoryState, StateStore, Table
from services.core.state.nats import NatsState, decode, encode
from services.core.telemetry import tracing

if TYPE_CHECKING:
    from tests.conftest import NatsServer


@pytest.fixture(params=["memory", "nats"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[StateStore]:
    if request.param == "memory":
        yield MemoryState()
        return
    server: NatsServer = request.getfixturevalue("nats_server")
    connection = await connect(server.url, user=server.user, password=server.password)
    yield NatsState(connection, f"test-{uuid.uuid4().hex}")
    await connection.close()


@pytest.fixture
def runs(store: StateStore) -> Table[Run]:
    return Table(store, Run, missing=errors.RunNotFound)


async def take(entries: AsyncIterator[Entry], count: int) -> list[Entry]:
    async with asyncio.timeout(10):
        return [await anext(entries) for _ in range(count)]


# --- the store --------------------------------------------------------------------------------------------------------


async def test_created_is_read(store: StateStore) -> None:
    revision = await store.create("projects/p", b"one")
    assert await store.get("projects/p") == Entry("projects/p", b"one", revision)
    assert await store.get("projects/q") is None


async def test_create_refuses_a_key_that_is_there(store: StateStore) -> None:
    await store.create("projects/p", b"one")
    with pytest.raises(errors.ResourceExists):
        await store.create("projects/p", b"two")


async def test_empty_value_is_a_value(store: StateStore) -> None:
    await store.create("projects/p", b"")
    assert (await store.get("projects/p") or pytest.fail("gone")).value == b""
    assert [entry.value for entry in await store.list()] == [b""]


async def test_update_needs_the_revision(store: StateStore) -> None:
    first = await store.create("projects/p", b"one")
    second = await store.update("projects/p", b"two", first)
    assert second > first
    for stale in (first, 0, -1, second + 1):
        with pytest.raises(errors.RevisionMismatch):
            await store.update("projects/p", b"three", stale)
    with pytest.raises(errors.RevisionMismatch):
        await store.update("projects/absent", b"x", 0)
    assert await store.get("projects/p") == Entry("projects/p", b"two", second)


async def test_one_of_many_writers_wins(store: StateStore) -> None:
    revision = await store.create("projects/p", b"start")

    async def write(number: int) -> bool:
        try:
            await store.update("projects/p", str(number).encode(), revision)
        except errors.RevisionMismatch:
            return False
        return True

    won = await asyncio.gather(*(write(number) for number in range(20)))
    assert sum(won) == 1
    assert (await store.get("projects/p") or pytest.fail("gone")).value == str(won.index(True)).encode()


async def test_delete(store: StateStore) -> None:
    revision = await store.create("projects/p", b"one")
    with pytest.raises(errors.RevisionMismatch):
        await store.delete("projects/p", revision + 1)
    await store.delete("projects/p", revision)
    assert await store.get("projects/p") is None
    assert await store.list() == [] and await store.keys() == []
    with pytest.raises(errors.RevisionMismatch):
        await store.delete("projects/p", revision)
    with pytest.raises(errors.RevisionMismatch):
        await store.update("projects/p", b"back", revision)
    await store.delete("projects/p")  # no revision: a missing key is fine
    assert await store.create("projects/p", b"again") > revision
    await store.delete("projects/p")
    assert await store.get("projects/p") is None


async def test_prefixes_cover_whole_segments(store: StateStore) -> None:
    keys = ["projects/p", "projects/p-2", "projects/p/runs/a", "projects/p/runs/b", "projects/p2", "projects/p2/runs/a"]
    for key in reversed(keys):
        await store.create(key, key.encode())

    async def listed(prefix: str) -> list[str]:
        found = [entry.key for entry in await store.list(prefix)]
        assert await store.keys(prefix) == found
        return found

    assert await listed("") == keys
    assert await listed("projects/p") == ["projects/p", "projects/p/runs/a", "projects/p/runs/b"]
    assert await listed("projects/p/") == ["projects/p/runs/a", "projects/p/runs/b"]
    assert await listed("projects/p/runs/b") == ["projects/p/runs/b"]
    assert await listed("projects/x") == []


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "a b", "a*", "a/>", "ü", "a\nb", "a/\x00", "a" * 1501])
async def test_bad_keys_are_refused(store: StateStore, key: str) -> None:
    with pytest.raises(errors.InvalidName):
        await store.create(key, b"")
    with pytest.raises(errors.InvalidName):
        await store.get(key)


async def test_a_subject_that_is_too_long_costs_the_call_and_not_the_connection(nats_server: NatsServer) -> None:
    """The server hangs up at a longer line, and the client then closes for good: nothing would work any more."""
    connection = await connect(nats_server.url, user=nats_server.user, password=nats_server.password)
    for length in (LONGEST_SUBJECT + 1, 70_000):
        with pytest.raises(nats.errors.BadSubjectError):
            await connection.js.publish("x" * length, b"")
    with pytest.raises(nats.errors.Error) as nobody:  # who listens there; the server has read it
        await connection.client.request("x" * LONGEST_SUBJECT, b"", timeout=2)
    assert isinstance(nobody.value, nats.errors.NoRespondersError)
    await connection.client.flush()
    await connection.close()


async def test_awkward_keys_come_back_as_they_were(store: StateStore) -> None:
    keys = sorted(["a.b", "a=2eb", "a/b", ".a", "a.", "=", "A-_=./..", "a=3d"])
    for key in keys:
        await store.create(key, key.encode())
    assert [entry.key for entry in await store.list()] == keys
    assert all([(await store.get(key) or pytest.fail(key)).value == key.encode() for key in keys])
    assert [entry.key for entry in await store.list("a")] == ["a/b"]


async def test_watch_shows_what_is_there_then_changes(store: StateStore) -> None:
    first = await store.create("projects/p", b"1")
    await store.create("projects/q", b"other")
    watched = store.watch("projects/p")
    assert await take(watched, 1) == [Entry("projects/p", b"1", first)]
    # Each is taken before the next: of a key only the latest value is kept, so that a watch may skip one.
    second = await store.update("projects/p", b"2", first)
    assert await take(watched, 1) == [Entry("projects/p", b"2", second)]
    await store.create("projects/q/runs/r", b"other")
    third = await store.create("projects/p/runs/r", b"3")
    assert await take(watched, 1) == [Entry("projects/p/runs/r", b"3", third)]
    await store.delete("projects/p", second)
    assert [(entry.key, entry.value) for entry in await take(watched, 1)] == [("projects/p", None)]
    await watched.aclose()  # type: ignore[attr-defined]


async def test_a_watch_tells_the_trace_of_what_wrote(store: StateStore) -> None:
    first, second = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01", "00-" + "12" * 16 + "-" + "34" * 8 + "-01"
    with tracing.under(first):
        revision = await store.create("projects/p", b"1")
    watched = store.watch("projects/p")
    assert [entry.traceparent for entry in await take(watched, 1)] == [first]
    with tracing.under(second):
        revision = await store.update("projects/p", b"2", revision)
    assert [entry.traceparent for entry in await take(watched, 1)] == [second]
    await store.update("projects/p", b"3", revision)
    assert [entry.traceparent for entry in await take(watched, 1)] == [""]
    await watched.aclose()  # type: ignore[attr-defined]


async def test_watch_of_an_empty_bucket_shows_the_first_key(store: StateStore) -> None:
    watched = store.watch()
    first = asyncio.ensure_future(anext(watched))
    await asyncio.sleep(0.1)
    await store.create("projects/p", b"1")
    assert (await asyncio.wait_for(first, 20)).key == "projects/p"


async def test_a_look_at_the_keys_makes_no_bucket(nats_server: NatsServer) -> None:
    connection = await connect(nats_server.url, user=nats_server.user, password=nats_server.password)
    bucket = f"test-{uuid.uuid4().hex}"
    assert await NatsState(connection, bucket).keys("projects/p/") == []
    assert f"KV_{bucket}" not in {info.config.name for info in await connection.js.streams_info()}
    await connection.close()


async def test_many_entries_are_listed_whole(store: StateStore) -> None:
    for start in range(0, 2_000, 100):
        await asyncio.gather(
            *(store.create(f"projects/p/runs/{number:05}", b"x" * 500) for number in range(start, start + 100))
        )
    began = time.monotonic()
    entries = await store.list("projects/p/")
    assert [entry.key for entry in entries] == [f"projects/p/runs/{number:05}" for number in range(2_000)]
    assert time.monotonic() - began < 5  # one request a key takes far longer on a busy machine


# --- tables -----------------------------------------------------------------------------------------------------------


def run_named(name: str, *, created: int = 0, title: str = "") -> Run:
    status = JobStatus()
    status.create_time.FromSeconds(created)
    return Run(name=f"projects/p/runs/{name}", title=title, status=status)


async def test_table_round_trip(runs: Table[Run]) -> None:
    created = await runs.create(run_named("a", title="first"))
    assert created.etag
    assert await runs.get("projects/p/runs/a") == created == await runs.find("projects/p/runs/a")
    with pytest.raises(errors.ResourceExists):
        await runs.create(run_named("a"))
    assert await runs.find("projects/p/runs/b") is None
    with pytest.raises(errors.RunNotFound) as missing:
        await runs.get("projects/p/runs/b")
    assert missing.value.metadata == {"name": "projects/p/runs/b"}


async def test_etags(runs: Table[Run]) -> None:
    created = await runs.create(run_named("a"))
    changed = await runs.mutate(created.name, lambda run: setattr(run, "title", "new"), etag=created.etag)
    assert (changed.title, changed.etag != created.etag) == ("new", True)
    with pytest.raises(errors.EtagMismatch):
        await runs.mutate(created.name, lambda run: setattr(run, "title", "late"), etag=created.etag)
    with pytest.raises(errors.EtagMismatch):
        await runs.delete(created.name, etag=created.etag)
    unchanged = await runs.mutate(created.name, lambda run: setattr(run, "title", "new"))
    assert unchanged.etag == changed.etag  # nothing changed: nothing written
    await runs.delete(created.name, etag=changed.etag)
    with pytest.raises(errors.RunNotFound):
        await runs.delete(created.name)
    with pytest.raises(errors.RunNotFound):
        await runs.mutate(created.name, lambda run: None)


async def test_concurrent_changes_all_count(runs: Table[Run]) -> None:
    created = await runs.create(run_named("a"))

    def increment(run: Run) -> None:
        run.step += 1

    await asyncio.gather(*(runs.mutate(created.name, increment) for _ in range(10)))
    assert (await runs.get(created.name)).step == 10


async def test_a_failing_change_writes_nothing(runs: Table[Run]) -> None:
    created = await runs.create(run_named("a"))

    def refuse(run: Run) -> None:
        run.title = "half"
        raise errors.InvalidTransition("no")

    with pytest.raises(errors.InvalidTransition):
        await runs.mutate(created.name, refuse)
    assert await runs.get(created.name) == created


async def test_tables_share_a_bucket(store: StateStore, runs: Table[Run]) -> None:
    projects = Table(store, Project, missing=errors.ProjectNotFound)
    await projects.create(Project(name="projects/p"))
    await runs.create(run_named("a"))
    assert [project.name for project in await projects.all()] == ["projects/p"]
    assert [run.name for run in await runs.all("projects/p")] == ["projects/p/runs/a"]
    assert await runs.all("projects/other") == []


async def test_pages(runs: Table[Run]) -> None:
    for number in range(5):
        await runs.create(run_named(f"r{number}", created=1000 - number if number < 3 else 0))
    await runs.create(Run(name="projects/p2/runs/x"))
    names = []
    token = ""
    while True:
        page, token = await runs.page("projects/p", 2, token)
        names.append([run.name[-2:] for run in page])
        if not token:
            break
    assert names == [["r0", "r1"], ["r2", "r3"], ["r4"]]
    everything, token = await runs.page("", 0, "")
    assert (len(everything), token) == (6, "")
    exact, token = await runs.page("projects/p", 5, "")
    assert (len(exact), token) == (5, "")


async def test_newest_first(runs: Table[Run]) -> None:
    for number, created in enumerate([20, 10, 30, 10]):
        await runs.create(run_named(f"r{number}", created=created))
    first, token = await runs.page("projects/p", 3, "", newest_first=True)
    await runs.create(run_named("new", created=40))  # shifts nothing on the next page
    rest, end = await runs.page("projects/p", 3, token, newest_first=True)
    assert [run.name[-2:] for run in [*first, *rest]] == ["r2", "r0", "r1", "r3"]
    assert end == ""


async def test_bad_pages(runs: Table[Run]) -> None:
    for number in range(3):
        await runs.create(run_named(f"r{number}"))
    with pytest.raises(errors.InvalidPageSize):
        await runs.page("projects/p", -1, "")
    _, token = await runs.page("projects/p", 1, "")
    foreign = [
        token[:-3],
        token + "A",
        "not a token",
        "ü",
        "bnVsbA",
        "W10",
        "WyJhIiwgMSwgMl0",
        "[" * 5000,
        token.upper(),
    ]
    for bad in foreign:
        with pytest.raises(errors.InvalidPageToken):
            await runs.page("projects/p", 1, bad)
    with pytest.raises(errors.InvalidPageToken):
        await runs.page("projects/q", 1, token)
    with pytest.raises(errors.InvalidPageToken):
        await runs.page("projects/p", 1, token, newest_first=True)


async def test_watch_of_a_record_ends_with_it(runs: Table[Run]) -> None:
    created = await runs.create(run_named("a"))
    await runs.create(run_named("b"))
    with pytest.raises(errors.RunNotFound):
        await anext(runs.watch("projects/p/runs/none"))
    seen = []
    async with asyncio.timeout(10):
        async for run in runs.watch(created.name):
            seen.append(run.title)
            if run.title == "":
                await runs.mutate("projects/p/runs/b", lambda run: setattr(run, "title", "other"))
                await runs.mutate(created.name, lambda run: setattr(run, "title", "new"))
            else:
                await runs.delete(created.name)
    assert seen == ["", "new"]


# --- the real server only ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["projects/p/runs/r-1", "a.b/c=d", "=2e", "x"])
def test_encoding_is_reversible(key: str) -> None:
    assert decode(encode(key)) == key


async def reconnected(connection: NatsConnection) -> None:
    async with asyncio.timeout(20):
        while not connection.client.is_connected:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_watch_survives_a_restart(own_nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = await connect(own_nats_server.url, user=own_nats_server.user, password=own_nats_server.password)
    store = NatsState(connection, "restart")
    revision = await store.create("projects/p", b"1")
    watched = store.watch("projects/p")
    assert [entry.value for entry in await take(watched, 1)] == [b"1"]
    own_nats_server.stop()
    began = time.monotonic()
    with monkeypatch.context() as hasty, pytest.raises(errors.StateUnavailable):
        hasty.setattr(connection.js, "_timeout", 1.0)
        await store.get("projects/p")
    assert time.monotonic() - began < 10
    own_nats_server.start()
    await reconnected(connection)
    revision = await store.update("projects/p", b"2", revision)  # an acknowledged write outlived the restart
    assert [entry.value for entry in await take(watched, 1)] == [b"2"]  # nothing twice, nothing lost
    await store.update("projects/p", b"3", revision)
    assert [entry.value for entry in await take(watched, 1)] == [b"3"]
    await connection.close()


async def test_a_change_during_an_outage_reaches_the_watch(own_nats_server: NatsServer) -> None:
    """The watcher's connection is cut while another one writes."""
    login = {"user": own_nats_server.user, "password": own_nats_server.password}
    watching, writing = await connect(own_nats_server.url, **login), await connect(own_nats_server.url, **login)
    store = NatsState(writing, "cut")
    revision = await store.create("projects/p", b"1")
    watched = NatsState(watching, "cut").watch()
    assert [entry.value for entry in await take(watched, 1)] == [b"1"]
    await watching.client.force_reconnect()
    revision = await store.update("projects/p", b"2", revision)
    await store.update("projects/p", b"3", revision)
    async with asyncio.timeout(10):
        while (await anext(watched)).value != b"3":
            pass
    await watching.close()
    await writing.close()


async def test_closed_readers_leave_no_consumer(nats_server: NatsServer) -> None:
    connection = await connect(nats_server.url, user=nats_server.user, password=nats_server.password)
    store = NatsState(connection, f"leak-{uuid.uuid4().hex}")
    await store.create("projects/p", b"1")
    for _ in range(5):
        await store.list()
        async with contextlib.aclosing(store.watch()) as watched:  # type: ignore[type-var]
            await anext(watched)
    async with asyncio.timeout(20):
        while await connection.js.consumers_info(store._stream):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await connection.close()


async def test_an_unreachable_server_is_named_soon() -> None:
    began = time.monotonic()
    with pytest.raises(errors.StateUnavailable, match=r"127\.0\.0\.1:1"):
        await connect("nats://127.0.0.1:1")
    assert time.monotonic() - began < 6


async def test_wrong_password_is_named(nats_server: NatsServer) -> None:
    with pytest.raises(errors.StateUnavailable, match=r"(?i)authorization") as refused:
        await connect(nats_server.url, user=nats_server.user, password="wrong")
    assert "CODEGRAFT_NATS_PASSWORD" in refused.value.hint


async def test_a_value_that_is_too_large_is_the_callers_fault(nats_server: NatsServer) -> None:
    connection = await connect(nats_server.url, user=nats_server.user, password=nats_server.password)
    store = NatsState(connection, f"large-{uuid.uuid4().hex}")
    with pytest.raises(errors.LimitExceeded):
        await store.create("projects/p", bytes(2_000_000))
    await connection.close()
