"""Who gets in: keys from their making to their end, from ingest's own service."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from codegraft.access.v1 import access_pb2
from codegraft.access.v1.access_pb2 import ROLE_COMPLETER, ROLE_CONTRIBUTOR, ROLE_OPERATOR, ROLE_READER
from codegraft.ingest.v1 import upload_pb2, upload_pb2_grpc
from services.client import AsyncCodegraft
from services.core import errors
from services.core.auth.caller import Caller, Role
from services.core.auth.gate import Gate
from services.core.auth.keyring import BUCKET, Keyring
from services.core.auth.keys import ApiKey
from services.core.rpc.status import from_rpc
from services.core.runtime import Runtime
from services.core.state import MemoryState
from services.ingest.assembly import Ingest
from services.ingest.config import IngestSettings
from services.ingest.keys import Keys, Seed
from tests.servers.ingest import serving

ROOT = Caller("keys/root", Role.OPERATOR, None)


@pytest.fixture
async def ingest(tmp_path: Path) -> AsyncIterator[tuple[AsyncCodegraft, str]]:
    """A real ingest service with authentication, and the operator's key."""
    runtime, root = Runtime.memory(tmp_path / "cache"), ApiKey.new("root").text
    parts = Ingest(runtime, IngestSettings(cache_dir=tmp_path / "cache"))
    await parts.keys.seed([Seed(key=root, role="operator")])  # type: ignore[arg-type]
    gate = Gate(Keyring(runtime.state(BUCKET)))
    following = asyncio.create_task(gate.run())
    async with serving(parts, gate) as client:
        yield client, root
    following.cancel()


async def test_projects_never_see_each_other(ingest: tuple[AsyncCodegraft, str]) -> None:
    client, root = ingest
    operator = client.with_key(root)
    for project in ("a", "b", "c"):
        await operator.projects.create(project)
    ours = client.with_key((await operator.keys.create(ROLE_OPERATOR, projects=["a", "c"]))[1])
    theirs = client.with_key((await operator.keys.create(ROLE_OPERATOR, projects=["b"]))[1])
    source = (await ours.sources.add_file("a", b"secret = 1\n", path="a.py", source_id="s")).name
    assert [each.name async for each in ours.projects.list(page_size=1)] == ["projects/a", "projects/c"]
    assert [each.name async for each in theirs.projects.list()] == ["projects/b"]
    for attempt in (
        theirs.projects.get("a"),
        theirs.sources.get(source),
        theirs.sources.sync(source),
        theirs.sources.upload("a", b"secret = 1\n"),
        theirs.snapshots.create("a"),
        theirs.projects.delete("a", force=True),
        theirs.projects.create("d"),
        anext(aiter(theirs.sources.list("a"))),
        anext(aiter(theirs.sources.watch(source))),
        anext(aiter(theirs.snapshots.collect_garbage())),
    ):
        with pytest.raises(errors.PermissionDenied):
            await attempt
    with pytest.raises(errors.Unauthenticated):
        await client.projects.get("a")
    assert (await ours.sources.get(source)).name == source


async def test_nobody_gives_away_more_than_he_has(ingest: tuple[AsyncCodegraft, str]) -> None:
    client, root = ingest
    operator = client.with_key(root)
    everything, _ = await operator.keys.create(ROLE_READER, all_projects=True, key_id="everything")
    two, _ = await operator.keys.create(ROLE_READER, projects=["a", "b"], key_id="two")
    made, secret = await operator.keys.create(ROLE_OPERATOR, projects=["a"], key_id="of-a", title="team a")
    assert (made.name, made.title, made.creator) == ("keys/of-a", "team a", "keys/root")
    of_a = client.with_key(secret)
    who = await of_a.keys.whoami()
    assert (who.subject, who.role, list(who.projects), who.all_projects) == (
        "keys/of-a", ROLE_OPERATOR, ["projects/a"], False,
    )  # fmt: skip
    below, _ = await of_a.keys.create(ROLE_COMPLETER, projects=["a"])
    assert {key.name async for key in of_a.keys.list()} == {"keys/of-a", below.name}
    for attempt in (
        of_a.keys.create(ROLE_READER, projects=["a", "b"]),
        of_a.keys.create(ROLE_READER, all_projects=True),
        of_a.keys.rotate(everything.name),
        of_a.keys.revoke(two.name),
        of_a.keys.revoke("root"),
    ):
        with pytest.raises(errors.PermissionDenied):
            await attempt
    contributor = client.with_key((await of_a.keys.create(ROLE_CONTRIBUTOR, projects=["a"]))[1])
    with pytest.raises(errors.PermissionDenied, match="operator"):
        await contributor.keys.create(ROLE_READER, projects=["a"])


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"role": 0, "projects": ["a"]}, "key.role"),
        ({"role": 9, "projects": ["a"]}, "key.role"),
        ({"role": ROLE_READER}, "key.projects"),
        ({"role": ROLE_READER, "projects": ["a"], "all_projects": True}, "key.projects"),
        ({"role": ROLE_READER, "projects": ["projects/a/runs/r"]}, "key.projects"),
        ({"role": ROLE_READER, "projects": ["a"], "key_id": "a_b"}, "key_id"),
        ({"role": ROLE_READER, "projects": ["a"], "title": "x" * 201}, "key.title"),
        ({"role": ROLE_READER, "projects": ["a"], "expires": datetime(2020, 1, 1, tzinfo=UTC)}, "key.expire_time"),
    ],
)
async def test_mistakes_are_told_by_field(ingest: tuple[AsyncCodegraft, str], given: Any, field: str) -> None:
    client, root = ingest
    with pytest.raises(errors.InvalidArgument) as refused:
        await client.with_key(root).keys.create(given.pop("role"), **given)
    assert refused.value.field.startswith(field)


async def test_the_same_request_again_makes_the_first_secret_void(ingest: tuple[AsyncCodegraft, str]) -> None:
    client, root = ingest
    keys = client.with_key(root).keys
    first = await keys.create(ROLE_READER, projects=["a"], request_id="r")
    second = await keys.create(ROLE_READER, projects=["a"], request_id="r")
    assert first[0].name == second[0].name and first[1] != second[1]
    await asyncio.sleep(0.05)
    assert (await client.with_key(second[1]).keys.whoami()).subject == second[0].name
    with pytest.raises(errors.Unauthenticated):
        await client.with_key(first[1]).keys.whoami()
    with pytest.raises(errors.RequestIdReused):
        await keys.create(ROLE_COMPLETER, projects=["a"], request_id="r", key_id=second[0].name.removeprefix("keys/"))
    with pytest.raises(errors.ResourceExists):
        await keys.create(ROLE_READER, projects=["a"], key_id="root")


async def test_rotation_lets_both_secrets_work_for_a_while(ingest: tuple[AsyncCodegraft, str]) -> None:
    client, root = ingest
    keys = client.with_key(root).keys
    made, first = await keys.create(ROLE_READER, projects=["a"])
    _, second = await keys.rotate(made.name, overlap=timedelta(seconds=30))
    await asyncio.sleep(0.05)
    for secret in (first, second):
        assert (await client.with_key(secret).keys.whoami()).subject == made.name
    rotated, third = await keys.rotate(made.name, overlap=timedelta())
    assert rotated.HasField("rotate_time")
    await asyncio.sleep(0.05)
    for secret in (first, second):
        with pytest.raises(errors.Unauthenticated):
            await client.with_key(secret).keys.whoami()
    assert (await client.with_key(third).keys.whoami()).subject == made.name
    for wrong in (timedelta(seconds=-1), timedelta(days=91)):
        with pytest.raises(errors.InvalidArgument):
            await keys.rotate(made.name, overlap=wrong)
    with pytest.raises(errors.KeyNotFound):
        await keys.rotate("nobody")


async def test_a_revoked_key_loses_its_calls_and_its_streams_within_seconds(ingest: tuple[AsyncCodegraft, str]) -> None:
    client, root = ingest
    operator = client.with_key(root)
    await operator.projects.create("a")
    made, secret = await operator.keys.create(ROLE_CONTRIBUTOR, projects=["a"])
    mine = client.with_key(secret)
    source = (await mine.sources.add_file("a", b"x = 1\n", path="a.py")).name
    watching = aiter(mine.sources.watch(source))
    await anext(watching)
    began = time.monotonic()
    revoked = await operator.keys.revoke(made.name)
    assert revoked.HasField("revoke_time")
    with pytest.raises(errors.KeyRevoked):
        while True:
            await asyncio.wait_for(anext(watching), 5)
    with pytest.raises(errors.KeyRevoked):
        await mine.sources.get(source)
    assert time.monotonic() - began < 5
    assert await operator.keys.revoke(made.name) == revoked
    with pytest.raises(errors.KeyRevoked):
        await operator.keys.rotate(made.name)


@pytest.mark.parametrize("begun", [True, False], ids=["under way", "that says nothing yet"])
async def test_an_upload_ends_with_its_key(ingest: tuple[AsyncCodegraft, str], begun: bool) -> None:
    client, root = ingest
    operator = client.with_key(root)
    await operator.projects.create("a")
    made, secret = await operator.keys.create(ROLE_CONTRIBUTOR, projects=["a"])

    speak, ended = threading.Event(), threading.Event()

    def slowly() -> Iterator[upload_pb2.UploadContentRequest]:
        speak.wait(10)
        header = upload_pb2.UploadHeader(parent="projects/a", sha256="0" * 64, size=1 << 20, filename="f")
        yield upload_pb2.UploadContentRequest(header=header)
        ended.wait(20)

    with grpc.insecure_channel(client.addresses.ingest) as channel:
        upload: Any = upload_pb2_grpc.UploadServiceStub(channel).UploadContent
        call = upload.future(slowly(), metadata=(("authorization", f"Bearer {secret}"),))
        await asyncio.to_thread(call.initial_metadata)
        if begun:
            speak.set()
        await asyncio.sleep(0.1)  # it is let in by now
        await operator.keys.revoke(made.name)
        speak.set()
        failure = await asyncio.wait_for(asyncio.to_thread(call.exception), 5)
        ended.set()
    assert from_rpc(failure).reason == "KEY_REVOKED"


async def test_secrets_are_stored_as_hashes_and_seeds_stay_revoked() -> None:
    state, seed = MemoryState(), ApiKey.new("seed")
    keys, seeds = Keys(state), [Seed(key=seed.text, role="operator")]  # type: ignore[arg-type]
    await keys.seed(seeds)
    _, secret = await keys.create(ROOT, "k", access_pb2.Key(role=ROLE_READER, all_projects=True), "")
    for entry in await state.list():
        assert entry.value and secret.encode() not in entry.value and seed.secret.encode() not in entry.value
    await keys.revoke(ROOT, "keys/seed")
    await keys.seed(seeds)
    found, _ = await keys.page(ROOT, 0, "")
    assert [(key.name, key.HasField("revoke_time")) for key in found] == [("keys/k", False), ("keys/seed", True)]
    await keys.seed([Seed(key=ApiKey.new("k").text, role="operator")])  # type: ignore[arg-type]
    assert (await keys.page(ROOT, 0, ""))[0][0].role == ROLE_READER, "settings take over no key that they did not make"
    ring = Keyring(state)
    following = asyncio.create_task(ring.run())
    fresh = ApiKey.new("fresh")
    await keys.seed([Seed(key=ApiKey.new("fresh").text, role="operator")])  # type: ignore[arg-type]
    await keys.seed([Seed(key=fresh.text, role="reader")])  # type: ignore[arg-type]
    assert (await ring.caller(fresh.text)).role is Role.READER
    following.cancel()


@pytest.mark.parametrize(
    ("key", "role"),
    [("cg_x_short", "reader"), ("", "reader"), (ApiKey.new("x").text, "king")],
    ids=["short", "empty", "unknown role"],
)
def test_a_seed_that_cannot_be_is_refused_without_repeating_it(key: str, role: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        Seed(key=key, role=role)  # type: ignore[arg-type]
