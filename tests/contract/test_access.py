"""Who gets in: every RPC over a real server with a key of another project, and keys from their making to their end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from codegraft.access.v1 import access_pb2
from codegraft.access.v1.access_pb2 import ROLE_COMPLETER, ROLE_CONTRIBUTOR, ROLE_OPERATOR, ROLE_READER
from codegraft.ingest.v1 import upload_pb2, upload_pb2_grpc
from services.client import AsyncCodegraft
from services.core import errors
from services.core.auth.caller import Caller, Role
from services.core.auth.gate import Gate
from services.core.auth.keyring import BUCKET, Keyring
from services.core.auth.keys import ApiKey
from services.core.rpc.interceptors import CallInterceptor
from services.core.rpc.status import from_rpc
from services.core.runtime import Runtime
from services.core.state import MemoryState
from services.ingest.assembly import Ingest
from services.ingest.config import IngestSettings
from services.ingest.keys import Keys, Seed
from tests.rpcs import METHODS, NAMED, RULES, named, request
from tests.servers.ingest import serving

ROOT = Caller("keys/root", Role.OPERATOR, None)


# --- every RPC, over the wire -----------------------------------------------------------------------------------


class Everything(grpc.GenericRpcHandler):
    """Has every method of the contract, and notes which were reached."""

    def __init__(self) -> None:
        self.reached: list[str] = []

    def service(self, details: Any) -> Any:
        method = METHODS.get(details.method)
        if method is None:
            return grpc.unary_unary_rpc_method_handler(self._note(details.method, lambda: b""))
        answer = message_factory.GetMessageClass(method.output_type)
        kind: Any = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[method.client_streaming, method.server_streaming]
        note = self._note_all if method.server_streaming else self._note
        return kind(
            note(details.method, answer),
            request_deserializer=message_factory.GetMessageClass(method.input_type).FromString,
            response_serializer=answer.SerializeToString,
        )

    def _note(self, method: str, answer: Any) -> Any:
        async def unary(request: Any, context: Any) -> Any:
            self.reached.append(method)
            return answer()

        return unary

    def _note_all(self, method: str, answer: Any) -> Any:
        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            self.reached.append(method)
            yield answer()

        return stream


class Wire(NamedTuple):
    """Channels of both libraries to one server."""

    aio: grpc.aio.Channel
    blocking: grpc.Channel
    """For streams of requests: see services.client.streams.answer_async."""


@pytest.fixture
async def house() -> AsyncIterator[tuple[Everything, Wire, dict[str, str]]]:
    """Every service behind the gate; keys of an operator of project a, of project b, and of everything."""
    state, everything = MemoryState(), Everything()
    keys, gate = Keys(state), Gate(Keyring(state))
    secrets = {}
    for id, projects in (("a", ["projects/a"]), ("b", ["projects/b"]), ("all", [])):
        asked = access_pb2.Key(role=ROLE_OPERATOR, projects=projects, all_projects=not projects)
        secrets[id] = (await keys.create(ROOT, id, asked, ""))[1]
    server = grpc.aio.server(interceptors=[CallInterceptor(gate)])
    server.add_generic_rpc_handlers((everything,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    following = asyncio.create_task(gate.run())
    address = f"127.0.0.1:{port}"
    async with grpc.aio.insecure_channel(address) as channel:
        with grpc.insecure_channel(address) as blocking:
            yield everything, Wire(channel, blocking), secrets
    following.cancel()
    await server.stop(None)


async def call(wire: Wire, path: str, message: Message | bytes, key: str = "") -> str:
    """The reason that the call ends with; "" when it is answered."""
    method = METHODS.get(path)
    sends, receives = (method.client_streaming, method.server_streaming) if method else (False, False)
    serialize = type(message).SerializeToString if isinstance(message, Message) else None
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    given: dict[str, Any] = {"metadata": metadata, "timeout": 20}
    try:
        if sends:
            kind: Any = wire.blocking.stream_stream if receives else wire.blocking.stream_unary
            answered = await asyncio.to_thread(kind(path, request_serializer=serialize), iter([message]), **given)
            await asyncio.to_thread(list, answered if receives else [])
        elif receives:
            async for _ in wire.aio.unary_stream(path, request_serializer=serialize)(message, **given):
                pass
        else:
            await wire.aio.unary_unary(path, request_serializer=serialize)(message, **given)
    except grpc.RpcError as error:
        return from_rpc(error).reason
    return ""


async def test_a_key_of_one_project_reaches_no_handler_with_names_of_another(house: Any) -> None:
    everything, wire, keys = house
    tried = 0
    for path, rule in NAMED.items():
        own = named(path, "projects/b", rule.fields[0], "/runs/r")
        for field in rule.fields:
            foreign = request(path, own | named(path, "projects/a", field, "/runs/r"))
            assert await call(wire, path, foreign, keys["b"]) == "PERMISSION_DENIED", (path, field)
            tried += 1
    for path, rule in RULES.items():
        if rule.all_projects:
            assert await call(wire, path, request(path, {}), keys["b"]) == "PERMISSION_DENIED", path
    assert tried > 60 and everything.reached == []


async def test_the_right_key_reaches_every_handler_and_no_key_none(house: Any) -> None:
    everything, wire, keys = house
    for path, rule in RULES.items():
        own = request(path, named(path, "projects/b", rule.fields[0]) if rule.fields else {})
        if rule.role is not None:
            assert await call(wire, path, own) == "UNAUTHENTICATED", path
        assert everything.reached == [], path
        key = "" if rule.role is None else keys["all" if rule.all_projects else "b"]
        assert await call(wire, path, own, key) == "", path
        assert everything.reached == [path]
        everything.reached.clear()


async def test_a_method_without_a_rule_is_denied_to_everybody(house: Any) -> None:
    everything, wire, keys = house
    for path in ("/codegraft.ingest.v1.ProjectService/StealProject", "/codegraft.new.v1.NewService/Get"):
        assert await call(wire, path, b"", keys["all"]) == "PERMISSION_DENIED"
    assert everything.reached == []


def times(descriptor: Descriptor, path: str = "", seen: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Paths of the times in a message, outside of lists, and which kind each is."""
    for field in descriptor.fields:
        inner = field.message_type
        if inner is None or field.is_repeated or inner.full_name in seen:
            continue
        if inner.full_name in ("google.protobuf.Timestamp", "google.protobuf.Duration"):
            yield path + field.name, inner.name
        yield from times(inner, f"{path}{field.name}.", (*seen, inner.full_name))


async def test_a_time_that_is_none_reaches_no_handler(house: Any) -> None:
    everything, wire, keys = house
    tried = set()
    for method, rule in RULES.items():
        for path, kind in times(METHODS[method].input_type):
            for seconds, nanos in ((2**63 - 1, 0), (-(2**63), 0), (1, 2**31 - 1), (1, -1)):
                made = request(method, named(method, "projects/a", rule.fields[0]) if rule.fields else {})
                holder = made
                for part in path.split("."):
                    holder = getattr(holder, part)
                holder.seconds, holder.nanos = seconds, nanos
                assert await call(wire, method, made, keys["all"]) == "INVALID_ARGUMENT", (method, path)
            tried.add(kind)
    assert tried == {"Timestamp", "Duration"} and everything.reached == []


# --- keys, from ingest's own service ----------------------------------------------------------------------------


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
