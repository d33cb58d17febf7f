"""A server that speaks the whole contract with scripted answers, and both clients behind one way to call them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message

from services.client import Addresses, AsyncCodegraft, Codegraft, retry
from services.core.backoff import Backoff
from services.core.errors import CodegraftError
from services.core.rpc.interceptors import CallInterceptor

Step = Message | CodegraftError | Callable[[Any], Any]
"""What to answer: a message, an error, or what a function makes of the request. A list of steps is a stream."""


@dataclass
class Fake(grpc.GenericRpcHandler):
    """Answers each call of a method with its next scripted answer, the last one for ever; empty responses otherwise."""

    scripts: dict[str, list[Step | list[Step]]] = field(default_factory=dict)
    requests: dict[str, list[Any]] = field(default_factory=dict)
    metadata: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """What each call brought beside its request; read while it runs, for grpc forgets it afterwards."""
    remaining: dict[str, list[float | None]] = field(default_factory=dict)
    """Seconds that each call had left when it arrived."""
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def count(self, method: str) -> int:
        return len(self.requests.get(method, []))

    def service(self, details: Any) -> Any:
        service, _, name = details.method.lstrip("/").partition("/")
        method = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
        request_class = message_factory.GetMessageClass(method.input_type)
        response_class = message_factory.GetMessageClass(method.output_type)

        async def step(wanted: Any, request: Any) -> Any:
            if isinstance(wanted, CodegraftError):
                raise wanted
            made = wanted if isinstance(wanted, Message) else wanted(request)
            return await made if isinstance(made, Awaitable) else made

        def arrived(request: Any, context: Any) -> Any:
            copy = request
            if isinstance(request, Message):
                copy = request_class()
                copy.CopyFrom(request)
            self.requests.setdefault(name, []).append(copy)
            self.metadata.setdefault(name, []).append(dict(context.invocation_metadata()))
            self.remaining.setdefault(name, []).append(context.time_remaining())
            script = self.scripts.get(name, [response_class()])
            return script.pop(0) if len(script) > 1 else script[0]

        async def unary(request: Any, context: Any) -> Any:
            try:
                return await step(arrived(request, context), request)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            script = arrived(request, context)
            try:
                for wanted in script if isinstance(script, list) else [script]:
                    yield await step(wanted, request)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise

        kind: Any = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
        }[method.client_streaming, method.server_streaming]
        return kind(
            stream if method.server_streaming else unary,
            request_deserializer=request_class.FromString,
            response_serializer=response_class.SerializeToString,
        )


@dataclass
class Either:
    """One of the two clients; the blocking one works in a thread, so that the fake can answer."""

    client: Any

    @property
    def blocks(self) -> bool:
        return isinstance(self.client, Codegraft)

    async def call(self, use: Callable[[Any], Any]) -> Any:
        """What the client's method returns."""
        if self.blocks:
            return await asyncio.to_thread(use, self.client)
        return await use(self.client)

    async def take(self, use: Callable[[Any], Any], limit: int | None = None) -> list[Any]:
        """The first items (all without a limit) of what the client's method iterates over."""
        if self.blocks:
            return await asyncio.to_thread(lambda: list(islice(use(self.client), limit)))
        found: list[Any] = []
        if limit != 0:
            async for item in use(self.client):
                found.append(item)
                if len(found) == limit:
                    break
        return found


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
async def address(fake: Fake) -> AsyncIterator[str]:
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    server.add_generic_rpc_handlers((fake,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture(params=["async", "blocking"])
async def codegraft(request: pytest.FixtureRequest, address: str) -> AsyncIterator[Either]:
    addresses = Addresses(address, address, address, address)
    if request.param == "async":
        async with AsyncCodegraft(addresses) as client:
            yield Either(client)
    else:
        with Codegraft(addresses) as blocking:
            yield Either(blocking)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries that wait for milliseconds."""
    monkeypatch.setattr(retry, "_BACKOFF", Backoff(timedelta(milliseconds=2), timedelta(milliseconds=4)))
