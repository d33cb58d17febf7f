"""API keys, the ring that a service knows them by, and the gate that calls go through."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from grpc_reflection.v1alpha import reflection_pb2

from codegraft.access.v1.access_pb2 import ROLE_CONTRIBUTOR, ROLE_READER, StoredKey
from codegraft.ingest.v1.project_pb2 import GetProjectRequest
from codegraft.ingest.v1.upload_pb2 import UploadContentRequest
from services.cli.local import permissions
from services.core import errors
from services.core.auth import policy
from services.core.auth.caller import ANYBODY, Caller, Role
from services.core.auth.gate import Gate
from services.core.auth.keyring import BUCKET, Keyring
from services.core.auth.keys import ApiKey, is_id
from services.core.backoff import Backoff
from services.core.config import CoreSettings
from services.core.errors import InvalidArgument, KeyExpired, KeyRevoked, PermissionDenied, Unauthenticated
from services.core.state import MemoryState, Table

GET, DELETE = "/codegraft.ingest.v1.ProjectService/GetProject", "/codegraft.ingest.v1.ProjectService/DeleteProject"


async def heard() -> None:
    """Whoever follows the bucket has heard of all changes: that takes turns of the loop, and no time."""
    for _ in range(50):
        await asyncio.sleep(0)


class World:
    """A bucket of keys, and a keyring that follows it."""

    def __init__(self) -> None:
        self.store = MemoryState()
        self.table = Table(self.store, StoredKey, missing=errors.KeyNotFound)
        self.ring = Keyring(self.store)
        self.gate = Gate(self.ring)

    async def make(self, id: str = "k", *, role: int = ROLE_READER, projects: tuple[str, ...] = ("projects/p",)) -> str:
        key = ApiKey.new(id)
        stored = StoredKey(name=key.name)
        stored.key.name, stored.key.role = key.name, role  # type: ignore[assignment]
        stored.key.projects[:] = projects
        stored.key.all_projects = not projects
        stored.secrets.add(sha256=key.digest)
        await self.table.create(stored)
        return key.text

    async def change(self, id: str, change: Any) -> None:
        await self.table.mutate(f"keys/{id}", change)
        await heard()

    async def identify(self, header: str) -> Caller:
        return await self.gate.identify(GET, {"authorization": header})


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    running = asyncio.create_task(world.gate.run())
    yield world
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.core.auth.keyring._PATIENCE", 0.05)


def test_a_key_has_256_random_bits_and_is_found_again() -> None:
    keys = {ApiKey.new("ci").text for _ in range(100)}
    assert len(keys) == 100
    for text in keys:
        parsed = ApiKey.parse(text)
        assert parsed is not None and parsed.text == text and parsed.name == "keys/ci"
        assert len(parsed.secret) >= 43 and parsed.secret not in repr(parsed)
        assert len(parsed.digest) == 32


LONG = "x" * 43


@pytest.mark.parametrize(
    "text",
    ["", "cg_", "cg_ci", "cg_ci_", "cg_ci_short", f"cg_Ci_{LONG}", f"cg_ci_{LONG[1:]}", f"cg_ci_{LONG} ",
     f"cg_-_{LONG}", f"xx_ci_{LONG}", f"cg_ci_{LONG * 10}", "cg_ci_" + "ä" * 43, f"cg_ci_{LONG}\n"],
)  # fmt: skip
def test_what_is_no_key(text: str) -> None:
    assert ApiKey.parse(text) is None


def test_ids() -> None:
    assert all(map(is_id, ["a", "0", "ci-2", "a" * 32]))
    assert not any(map(is_id, ["", "-", "a-", "A", "a_b", "a" * 33, "a/b", "a\n"]))


async def test_a_known_key_makes_its_caller(world: World) -> None:
    text = await world.make(role=ROLE_CONTRIBUTOR, projects=("projects/p", "projects/q"))
    for header in (f"Bearer {text}", f"bearer {text}", f"BEARER  {text} "):
        caller = await world.identify(header)
        assert (caller.subject, caller.role) == ("keys/k", Role.CONTRIBUTOR)
        assert caller.projects == {"projects/p", "projects/q"}
    everywhere = await world.identify(f"Bearer {await world.make('all', projects=())}")
    assert everywhere.projects is None


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic dTpw", "x", "Bearer nonsense", "Bearer cg_k_" + "x" * 43]
)
async def test_nobody_else_comes_in(world: World, hasty: None, header: str) -> None:
    await world.make()
    with pytest.raises(Unauthenticated) as refused:
        await world.identify(header)
    assert refused.value.reason == "UNAUTHENTICATED" and refused.value.hint
    assert "xxxx" not in refused.value.message


async def test_the_secret_of_another_key_is_refused(world: World) -> None:
    one, other = await world.make("one"), await world.make("two")
    with pytest.raises(Unauthenticated, match="not known"):
        await world.identify("Bearer " + one.replace("cg_one_", "cg_two_"))
    assert (await world.identify(f"Bearer {other}")).subject == "keys/two"


async def test_a_revoked_key_is_refused_at_once_and_its_streams_end(world: World) -> None:
    text = await world.make()
    caller = await world.identify(f"Bearer {text}")
    ended = asyncio.Event()
    with world.gate.holding(caller, ended.set):
        await world.change("k", lambda stored: stored.key.revoke_time.GetCurrentTime())
        assert ended.is_set()
    assert isinstance(world.gate.why_ended(caller), KeyRevoked)
    with pytest.raises(KeyRevoked):
        await world.identify(f"Bearer {text}")
    with pytest.raises(Unauthenticated, match="not known"):  # who has not the secret does not learn it
        await world.identify("Bearer cg_k_" + "x" * 43)


async def test_another_change_of_a_key_ends_no_stream(world: World) -> None:
    caller = await world.identify(f"Bearer {await world.make()}")
    ended = asyncio.Event()
    with world.gate.holding(caller, ended.set):
        await world.change("k", lambda stored: setattr(stored.key, "title", "new"))
        assert not ended.is_set()
    await world.change("k", lambda stored: stored.key.revoke_time.GetCurrentTime())
    assert not ended.is_set(), "the stream had ended before"
    assert world.ring._held == {}


async def test_a_stream_ends_with_the_secret_that_it_began_with(world: World) -> None:
    caller = await world.identify(f"Bearer {await world.make()}")
    ended = asyncio.Event()

    def rotate(stored: StoredKey) -> None:
        stored.secrets[0].expire_time.FromNanoseconds(time.time_ns() + 500_000_000)
        stored.secrets.add(sha256=b"new")

    with world.gate.holding(caller, ended.set):
        await world.change("k", rotate)
        assert not ended.is_set()
        await asyncio.wait_for(ended.wait(), 10)
    assert isinstance(world.gate.why_ended(caller), KeyExpired)


async def test_a_stream_ends_when_its_key_loses_the_project_that_it_is_about(world: World) -> None:
    caller = await world.identify(f"Bearer {await world.make(projects=('projects/p', 'projects/q'))}")
    about = [policy.about(caller, GET, GetProjectRequest(name=f"projects/{id}")) for id in "pq"]
    ended = [asyncio.Event(), asyncio.Event()]
    with world.gate.holding(about[0], ended[0].set), world.gate.holding(about[1], ended[1].set):
        await world.change("k", lambda stored: stored.key.projects.remove("projects/p"))
        assert [each.is_set() for each in ended] == [True, False]
    assert isinstance(world.gate.why_ended(about[0]), PermissionDenied) and world.gate.why_ended(about[1]) is None


async def test_a_deleted_key_is_forgotten(world: World, hasty: None) -> None:
    text = await world.make()
    caller = await world.identify(f"Bearer {text}")
    await world.table.delete("keys/k")
    await heard()
    with pytest.raises(Unauthenticated, match="not known"):
        await world.identify(f"Bearer {text}")
    assert isinstance(world.gate.why_ended(caller), KeyRevoked)


async def test_keys_and_secrets_end_by_themselves(world: World) -> None:
    text = await world.make()
    second = ApiKey.new("k")

    def rotated(stored: StoredKey) -> None:
        stored.secrets[0].expire_time.FromNanoseconds(time.time_ns() + 500_000_000)
        stored.secrets.add(sha256=second.digest)

    await world.change("k", rotated)
    caller = await world.identify(f"Bearer {text}")
    assert caller.expires is not None and (await world.identify(f"Bearer {second.text}")).expires is None
    ended = asyncio.Event()
    with world.gate.holding(caller, ended.set):
        await asyncio.wait_for(ended.wait(), 10)
    assert isinstance(world.gate.why_ended(caller), KeyExpired)
    with pytest.raises(KeyExpired, match="this secret of keys/k"):
        await world.identify(f"Bearer {text}")
    await world.change("k", lambda stored: stored.key.expire_time.FromNanoseconds(time.time_ns()))
    with pytest.raises(KeyExpired, match=r"^keys/k has expired"):
        await world.identify(f"Bearer {second.text}")


async def test_a_key_that_is_made_just_now_is_waited_for(world: World) -> None:
    key = ApiKey.new("k")
    coming = asyncio.create_task(world.identify(f"Bearer {key.text}"))
    await asyncio.sleep(0.02)
    stored = StoredKey(name=key.name)
    stored.key.name, stored.key.role = key.name, ROLE_READER
    stored.secrets.add(sha256=key.digest)
    await world.table.create(stored)
    assert (await asyncio.wait_for(coming, 10)).subject == "keys/k"


async def test_before_the_keys_are_read_the_answer_is_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.core.auth.keyring._LOADING", 0.02)
    world = World()
    with pytest.raises(errors.StateUnavailable) as refused:
        await world.identify("Bearer " + ApiKey.new("k").text)
    assert refused.value.retry_after


class Outage(MemoryState):
    """Fails while it is down."""

    down = False

    async def list(self, prefix: str = "") -> Any:
        if self.down:
            raise errors.StateUnavailable("down")
        return await super().list(prefix)

    async def watch(self, prefix: str = "") -> Any:
        if self.down:
            raise errors.StateUnavailable("down")
        async for entry in super().watch(prefix):
            yield entry
            if self.down:
                raise errors.StateUnavailable("down")


async def test_known_keys_outlive_an_outage_of_nats(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = Backoff(timedelta(milliseconds=2), timedelta(milliseconds=5))
    monkeypatch.setattr("services.core.auth.keyring.Backoff", lambda: quick)
    world = World()
    world.store = store = Outage()
    world.table = Table(store, StoredKey, missing=errors.KeyNotFound)
    world.gate = Gate(Keyring(store))
    running = asyncio.create_task(world.gate.run())
    text = await world.make()
    assert (await world.identify(f"Bearer {text}")).subject == "keys/k"
    store.down = True
    await world.make("during")
    await asyncio.sleep(0.03)
    assert (await world.identify(f"Bearer {text}")).subject == "keys/k"
    await world.table.mutate("keys/k", lambda stored: stored.key.revoke_time.GetCurrentTime())
    assert (await world.identify(f"Bearer {text}")).subject == "keys/k", "the news cannot have arrived"
    store.down = False
    with pytest.raises(KeyRevoked):
        for _ in range(200):
            await world.identify(f"Bearer {text}")
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_role_of_a_newer_release_is_refused_and_no_other_key_suffers(world: World, hasty: None) -> None:
    good, newer = await world.make("good"), await world.make("newer", role=77)
    with pytest.raises(Unauthenticated):
        await world.identify(f"Bearer {newer}")
    assert (await world.identify(f"Bearer {good}")).subject == "keys/good"


# --- the gate ---------------------------------------------------------------------------------------------------


def settings(**given: Any) -> CoreSettings:
    return CoreSettings(**given)


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:1", "127.0.0.1.example.org:1"])
def test_without_authentication_only_loopback_is_listened_to(listen: str) -> None:
    with pytest.raises(InvalidArgument, match="other machines") as refused:
        Gate.of(settings(auth="off", listen=listen), None)
    assert refused.value.field == "CODEGRAFT_AUTH"


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:5", "[::1]:0", "127.8.9.1:2"])
async def test_on_loopback_authentication_may_be_off(listen: str) -> None:
    gate = Gate.of(settings(auth="off", listen=listen), None)
    assert await gate.identify(DELETE, {}) is ANYBODY
    await gate.run()


def test_authentication_is_on_unless_it_is_set_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CODEGRAFT_AUTH")
    with pytest.raises(InvalidArgument, match="no bucket"):
        Gate.of(settings(), None)


async def test_health_asks_nobody(world: World) -> None:
    assert await world.gate.identify("/grpc.health.v1.Health/Check", {}) is ANYBODY
    with pytest.raises(Unauthenticated):
        await world.gate.identify("/grpc.health.v1.Other/Check", {})


async def test_every_header_in_a_stream_is_looked_at(world: World) -> None:
    def message(parent: str) -> UploadContentRequest:
        made = UploadContentRequest()
        made.header.parent = parent
        return made

    async def stream(*parents: str) -> AsyncIterator[UploadContentRequest]:
        for parent in parents:
            yield message(parent) if parent else UploadContentRequest(chunk={"data": b"x"})  # type: ignore[arg-type]

    method = "/codegraft.ingest.v1.UploadService/UploadContent"
    caller = Caller("keys/k", Role.CONTRIBUTOR, frozenset({"projects/p"}))
    taken = await world.gate.admit(caller, method, stream("projects/p", "", ""))
    assert len([each async for each in taken]) == 3
    assert [each async for each in await world.gate.admit(caller, method, stream())] == []
    for first in ("projects/other", ""):
        with pytest.raises(PermissionDenied):
            await world.gate.admit(caller, method, stream(first))
    late = await world.gate.admit(caller, method, stream("projects/p", "", "projects/other"))
    seen = []
    with contextlib.suppress(PermissionDenied):
        async for each in late:
            seen.append(each)
        raise AssertionError("the second header was let through")
    assert len(seen) == 2


async def test_a_stream_without_headers_goes_through(world: World) -> None:
    async def stream() -> AsyncIterator[Any]:
        for symbol in ("a", "b", "c"):
            yield reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)

    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    caller = Caller("keys/k", Role.READER, frozenset({"projects/p"}))
    assert len([each async for each in await world.gate.admit(caller, method, stream())]) == 3


def test_the_bucket_is_the_one_that_nats_permits() -> None:
    assert f"KV_{BUCKET}" == permissions.KEYS
