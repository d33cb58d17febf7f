"""A server that speaks the contract with canned answers, and the real command against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message
from grpc_status import rpc_status

import services.client  # noqa: F401  (imports every proto of the contract into the pool)
from services.cli.main import main
from services.core.errors import CodegraftError
from services.core.rpc.status import to_status

Answer = Message | CodegraftError | list[Message] | Callable[[Any], Message]


@dataclass
class FakeServices(grpc.GenericRpcHandler):
    """Answers any call of the contract by its short name; a list is a stream. Keeps every request."""

    answers: dict[str, Answer] = field(default_factory=dict)
    requests: dict[str, list[Any]] = field(default_factory=dict)

    def last(self, method: str) -> Any:
        return self.requests[method][-1]

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        service, _, name = details.method.lstrip("/").partition("/")
        method = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
        request_class = message_factory.GetMessageClass(method.input_type)

        def respond(incoming: Any, context: grpc.ServicerContext) -> Any:
            if name not in self.answers:
                context.abort(grpc.StatusCode.UNIMPLEMENTED, f"the test has no answer for {name}")
            request = list(incoming) if method.client_streaming else incoming
            self.requests.setdefault(name, []).append(request)
            answer = self.answers[name]
            if isinstance(answer, CodegraftError):
                context.abort_with_status(rpc_status.to_status(to_status(answer)))
            return answer(request) if callable(answer) else answer

        def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Message]:
            yield from respond(request, context)

        kind = (method.client_streaming, method.server_streaming)
        handler: Any = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
        }[kind]
        made: grpc.RpcMethodHandler[Any, Any] = handler(
            stream if method.server_streaming else respond,
            request_deserializer=request_class.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        return made


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServices]:
    """All four services in one, where the command looks for them."""
    handler = FakeServices()
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    for name in ("INGEST", "SCANNER", "TRAINER", "INFERENCE"):
        monkeypatch.setenv(f"CODEGRAFT_{name}_ADDRESS", f"127.0.0.1:{port}")
    monkeypatch.delenv("CODEGRAFT_PROJECT", raising=False)
    yield handler
    server.stop(None)


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def codegraft(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs one command in this process."""

    def run(*arguments: str) -> Done:
        code = main(arguments)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run
