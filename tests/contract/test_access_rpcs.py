"""Who gets in: every RPC over a real server, with a key of another project, with the right one and with none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from codegraft.access.v1 import access_pb2
from codegraft.access.v1.access_pb2 import ROLE_OPERATOR
from services.core.auth.caller import Caller, Role
from services.core.auth.gate import Gate
from services.core.auth.keyring import Keyring
from services.core.rpc.interceptors import CallInterceptor
from services.core.rpc.status import from_rpc
from services.core.state import MemoryState
from services.ingest.keys import Keys
from tests.rpcs import METHODS, NAMED, RULES, named, request

ROOT = Caller("keys/root", Role.OPERATOR, None)


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
            if receives:
                await asyncio.to_thread(list, answered)
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
