"""What every call goes through: a small service behind the real interceptor, on a real port."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from opentelemetry.trace import SpanKind

from services.core import errors, log
from services.core.rpc import client
from services.core.rpc.interceptors import CallInterceptor
from services.core.rpc.status import from_rpc
from services.core.telemetry import tracing
from tests.spans import recording

TRACE = "ab" * 16
TRACEPARENT = f"00-{TRACE}-{'cd' * 8}-01"


class Echo(grpc.GenericRpcHandler):
    """Raises what the request names, tells what arrived, streams, waits; and calls another such service."""

    def __init__(self, onward: grpc.aio.Channel | None = None) -> None:
        self.onward = onward
        self.waiting = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.cleaned_up = asyncio.Event()

    def service(self, details: Any) -> Any:
        match details.method:
            case "/test.Echo/Fail":
                return grpc.unary_unary_rpc_method_handler(self.fail)
            case "/test.Echo/FailStream":
                return grpc.unary_stream_rpc_method_handler(self.fail_stream)
            case "/test.Echo/Sum":
                return grpc.stream_unary_rpc_method_handler(self.sum)
            case "/test.Echo/Seen":
                return grpc.unary_unary_rpc_method_handler(self.seen)
            case "/test.Echo/Onward":
                return grpc.unary_unary_rpc_method_handler(self.go_onward)
            case "/test.Echo/Wait":
                return grpc.unary_unary_rpc_method_handler(self.wait)
            case "/test.Echo/Count":
                return grpc.unary_stream_rpc_method_handler(self.count)
            case "/test.Echo/WatchCount":
                return grpc.unary_stream_rpc_method_handler(self.count)
            case "/test.Echo/Abort":
                return grpc.unary_unary_rpc_method_handler(self.abort)

    @staticmethod
    def make(name: bytes) -> Exception:
        if name == b"ZeroDivisionError":
            return ZeroDivisionError("the password is hunter2")
        found = {error.__name__: error for error in errors.all_errors()}[name.decode()]
        return found("what went wrong, ü", field="a.b", hint="do this", retry_after=1.25, size="12", path="x/y")

    async def fail(self, request: bytes, context: Any) -> bytes:
        raise self.make(request)

    async def fail_stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        raise self.make(request)

    async def sum(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b"%d" % sum([int(request) async for request in requests])

    async def seen(self, request: bytes, context: Any) -> bytes:
        log.get("echo").info("seen")
        left = context.time_remaining()
        return json.dumps({"left": left, **dict(context.invocation_metadata())}).encode()

    async def go_onward(self, request: bytes, context: Any) -> bytes:
        await asyncio.sleep(0.2)
        assert self.onward is not None
        answer: bytes = await self.onward.unary_unary("/test.Echo/Seen")(request)
        return answer

    async def wait(self, request: bytes, context: Any) -> bytes:
        self.waiting.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return b""

    async def count(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        number = 0
        try:
            while True:
                yield b"%d" % number + b"." * int(request or b"0")
                number += 1
                if not request:
                    await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.cleaned_up.set()

    async def abort(self, request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "the handler's own words")
        raise AssertionError("abort raises")


@asynccontextmanager
async def serving(echo: Echo, address: str = "127.0.0.1:0") -> AsyncIterator[tuple[str, CallInterceptor]]:
    calls = CallInterceptor()
    server = grpc.aio.server(interceptors=[calls])
    server.add_generic_rpc_handlers((echo,))
    port = server.add_insecure_port(address)
    await server.start()
    try:
        yield f"127.0.0.1:{port}", calls
    finally:
        await server.stop(None)


@pytest.fixture
async def echo() -> Echo:
    return Echo()


@pytest.fixture
async def channel(echo: Echo) -> AsyncIterator[grpc.aio.Channel]:
    async with serving(echo) as (address, _), client.channel(address) as opened:
        yield opened


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    log.configure("test", "debug")
    return capsys


def check(error: errors.CodegraftError, sent: type[errors.CodegraftError]) -> None:
    # The root has no reason of its own: it is an internal error for whoever receives it.
    assert type(error) is (errors.InternalError if sent is errors.CodegraftError else sent)
    assert (error.code, error.reason) == (sent.code, sent.reason)
    assert (error.message, error.field, error.hint) == ("what went wrong, ü", "a.b", "do this")
    assert error.retry_after == 1.25
    assert error.metadata == {"size": "12", "path": "x/y"}


@pytest.mark.parametrize("sent", errors.all_errors(), ids=lambda error: error.__name__)
async def test_every_error_arrives_as_itself(channel: grpc.aio.Channel, sent: type[errors.CodegraftError]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/test.Echo/Fail")(sent.__name__.encode())
    assert caught.value.code() == grpc.StatusCode[sent.code.name]
    check(from_rpc(caught.value), sent)

    received = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for message in channel.unary_stream("/test.Echo/FailStream")(sent.__name__.encode()):
            received.append(message)
    assert received == [b"first"]
    check(from_rpc(caught.value), sent)


async def test_the_blocking_library_gets_the_same_errors(echo: Echo) -> None:
    def call(address: str) -> None:
        with grpc.insecure_channel(address) as opened:
            with pytest.raises(grpc.RpcError) as caught:
                opened.unary_unary("/test.Echo/Fail")(b"QueueFull")
            check(from_rpc(caught.value), errors.QueueFull)
            with pytest.raises(grpc.RpcError) as caught:
                list(opened.unary_stream("/test.Echo/FailStream")(b"LeaseLost"))
            check(from_rpc(caught.value), errors.LeaseLost)

    async with serving(echo) as (address, _):
        await asyncio.to_thread(call, address)


async def test_a_message_of_any_length_arrives_cut_and_not_as_another_error(echo: Echo) -> None:
    async def fail(request: bytes, context: Any) -> bytes:
        raise errors.BrokenArchive("漢" * 100_000, field="archive", hint="ü" * 100_000, member="m" * 100_000)

    echo.fail = fail  # type: ignore[method-assign]
    async with serving(echo) as (address, _), client.channel(address) as opened:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await opened.unary_unary("/test.Echo/Fail")(b"")
    error = from_rpc(caught.value)
    assert type(error) is errors.BrokenArchive
    assert error.message.endswith("…")
    assert error.metadata["member"].startswith("mmm")


@pytest.mark.parametrize("method", ["Fail", "FailStream"])
async def test_an_unexpected_exception_tells_the_request_id_and_nothing_else(
    channel: grpc.aio.Channel, method: str, logged: pytest.CaptureFixture[str]
) -> None:
    call = channel.unary_stream(f"/test.Echo/{method}")(b"ZeroDivisionError", metadata=(("x-request-id", "req-7"),))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    everything = repr((caught.value.details(), caught.value.initial_metadata(), caught.value.trailing_metadata()))
    assert "hunter2" not in everything
    assert "ZeroDivision" not in everything
    error = from_rpc(caught.value)
    assert type(error) is errors.InternalError
    assert error.metadata == {"request_id": "req-7"}
    assert "req-7" in error.message
    trace = next(line for line in lines(logged) if line["event"] == "unexpected error")
    assert trace["request_id"] == "req-7"
    assert "ZeroDivisionError" in trace["exception"]


async def test_a_request_id_is_echoed_before_and_after_and_logged(
    channel: grpc.aio.Channel, logged: pytest.CaptureFixture[str]
) -> None:
    sent = (("x-request-id", "req-1"), ("traceparent", TRACEPARENT))
    call = channel.unary_unary("/test.Echo/Seen")(b"", metadata=sent)
    await call
    assert dict(await call.initial_metadata())["x-request-id"] == "req-1"
    assert dict(await call.trailing_metadata())["x-request-id"] == "req-1"
    found = {line["event"]: line for line in lines(logged) if line.get("request_id") == "req-1"}
    assert set(found) == {"seen", "call"}  # the handler's own line, and the call's
    assert all(line["trace_id"] == TRACE for line in found.values())
    assert found["call"]["method"] == "/test.Echo/Seen"
    assert found["call"]["code"] == "OK"
    assert found["call"]["seconds"] >= 0


async def test_a_stream_knows_its_request_id_while_it_runs(channel: grpc.aio.Channel) -> None:
    call = channel.unary_stream("/test.Echo/Count")(b"")
    request_id = dict(await call.initial_metadata())["x-request-id"]
    assert len(request_id) == 16
    call.cancel()


async def test_failed_calls_have_their_request_id_and_one_line(
    channel: grpc.aio.Channel, logged: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/test.Echo/Fail")(b"RunNotFound")
    request_id = dict(caught.value.trailing_metadata())["x-request-id"]
    (line,) = [line for line in lines(logged) if line["event"] == "call"]
    assert line["request_id"] == request_id
    assert (line["code"], line["reason"], line["error"]) == ("NOT_FOUND", "RUN_NOT_FOUND", "what went wrong, ü")


async def test_a_handlers_own_abort_passes_and_is_logged_as_what_it_was(
    channel: grpc.aio.Channel, logged: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/test.Echo/Abort")(b"")
    assert caught.value.code() == grpc.StatusCode.OUT_OF_RANGE
    assert caught.value.details() == "the handler's own words"
    assert [line["code"] for line in lines(logged) if line["event"] == "call"] == ["OUT_OF_RANGE"]


async def test_concurrent_calls_keep_their_ids_apart(
    channel: grpc.aio.Channel, logged: pytest.CaptureFixture[str]
) -> None:
    async def one(number: int) -> None:
        call = channel.unary_unary("/test.Echo/Seen")(b"", metadata=(("x-request-id", f"req-{number}"),))
        assert dict(await call.trailing_metadata())["x-request-id"] == f"req-{number}"

    await asyncio.gather(*map(one, range(50)))
    seen = [line["request_id"] for line in lines(logged) if line["event"] == "seen"]
    assert sorted(seen) == sorted(f"req-{number}" for number in range(50))


async def test_a_downstream_call_carries_deadline_request_id_and_trace(channel: grpc.aio.Channel, echo: Echo) -> None:
    async with serving(Echo()) as (address, _), client.channel(address) as onward:
        echo.onward = onward
        sent = (("x-request-id", "req-2"), ("traceparent", TRACEPARENT))
        answer = await channel.unary_unary("/test.Echo/Onward")(b"", timeout=20, metadata=sent)
    seen = json.loads(answer)
    # Twenty seconds, less the 0.2 that were spent before and the margin; gRPC rounds up to tenths.
    assert 10 < seen["left"] < 19.95
    assert seen["x-request-id"] == "req-2"
    assert seen["traceparent"].split("-")[1] == TRACE
    assert seen["traceparent"] != TRACEPARENT  # its parent is the service in between


async def test_every_call_is_a_span_at_both_ends(echo: Echo) -> None:
    with recording() as recorder:
        async with serving(echo) as (address, _), client.channel(address) as caller:
            with tracing.under(TRACEPARENT):
                seen = json.loads(await caller.unary_unary("/test.Echo/Seen")(b""))
                with pytest.raises(grpc.aio.AioRpcError):
                    await caller.unary_unary("/test.Echo/Fail")(b"RunNotFound")
                counting = caller.unary_stream("/test.Echo/Count")(b"")
                async for _ in counting:
                    break
                counting.cancel()
                waiting = asyncio.ensure_future(caller.unary_unary("/test.Echo/Wait")(b""))
                await asyncio.wait_for(echo.waiting.wait(), 5)
                waiting.cancel()
                await asyncio.wait_for(echo.cancelled.wait(), 5)
            names = ("Seen", "Fail", "Count", "Wait")
            async with asyncio.timeout(10):
                while len(recorder.of(TRACE)) < 2 * len(names):  # noqa: ASYNC110  # until both ends have heard of all
                    await asyncio.sleep(0.01)
    spans = {(span.name.removeprefix("test.Echo/"), span.kind): span for span in recorder.of(TRACE)}
    assert set(spans) == {(name, kind) for name in names for kind in (SpanKind.CLIENT, SpanKind.SERVER)}
    for name in names:
        ours, theirs = spans[name, SpanKind.CLIENT], spans[name, SpanKind.SERVER]
        assert theirs.parent and theirs.parent.span_id == ours.context.span_id
        assert ours.parent and f"{ours.parent.span_id:016x}" == TRACEPARENT.split("-")[2]
    assert seen["traceparent"].split("-")[2] == f"{spans['Seen', SpanKind.CLIENT].context.span_id:016x}"
    told = {key: span.status.description or "" for key, span in spans.items()}
    assert [told[name, SpanKind.SERVER] for name in names] == ["", "RUN_NOT_FOUND", "CANCELLED", "CANCELLED"]
    assert [told[name, SpanKind.CLIENT] for name in names] == ["", "NOT_FOUND", "CANCELLED", "CANCELLED"]


async def test_a_call_without_a_deadline_gets_the_default_one(channel: grpc.aio.Channel) -> None:
    seen = json.loads(await channel.unary_unary("/test.Echo/Seen")(b""))
    assert client.DEFAULT_DEADLINE - 10 < seen["left"] < client.DEFAULT_DEADLINE + 1  # which gRPC rounds up


async def test_streamed_requests_work(channel: grpc.aio.Channel) -> None:
    async def numbers() -> AsyncIterator[bytes]:
        for number in range(10):
            yield b"%d" % number

    assert await channel.stream_unary("/test.Echo/Sum")(numbers()) == b"45"


async def test_a_client_that_goes_away_cancels_a_waiting_handler(
    channel: grpc.aio.Channel, echo: Echo, logged: pytest.CaptureFixture[str]
) -> None:
    call = channel.unary_unary("/test.Echo/Wait")(b"")
    await asyncio.wait_for(echo.waiting.wait(), 5)
    call.cancel()
    await asyncio.wait_for(echo.cancelled.wait(), 5)
    await asyncio.sleep(0.05)
    assert [line["code"] for line in lines(logged) if line["event"] == "call"] == ["CANCELLED"]


async def test_a_connection_that_breaks_cancels_its_handlers(echo: Echo) -> None:
    async with serving(echo) as (address, _):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c",
            "import grpc, sys; call = grpc.insecure_channel(sys.argv[1]).unary_stream('/test.Echo/Count')(b'')\n"
            "for message in call: print(message, flush=True)",
            address, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        await asyncio.wait_for(process.stdout.readline(), 30)
        process.kill()
        # Not told of a cancellation when that met the server inside of a write.
        await asyncio.wait_for(echo.cleaned_up.wait(), 5)
        await process.wait()


async def test_a_stream_cancelled_while_it_writes_cleans_up_at_once(
    echo: Echo, logged: pytest.CaptureFixture[str]
) -> None:
    """A reader that never reads fills the window, so that the cancellation meets the server inside of a write."""
    async with serving(echo) as (address, _), client.channel(address) as opened:
        call = opened.unary_stream("/test.Echo/Count")(b"100000")
        await call.initial_metadata()
        await asyncio.sleep(0.3)
        call.cancel()
        await asyncio.wait_for(echo.cleaned_up.wait(), 5)
        await asyncio.sleep(0.05)
    told = [(line["event"], line.get("code")) for line in lines(logged) if line["level"] != "debug"]
    assert told == [("call", "CANCELLED")], "that somebody has gone is no defect"


async def test_the_deadline_ends_the_handler_and_is_logged_as_such(
    channel: grpc.aio.Channel, echo: Echo, logged: pytest.CaptureFixture[str]
) -> None:
    while not echo.waiting.is_set():  # the machine may stand still until a deadline is over
        lines(logged)  # of one that never came to the handler
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/test.Echo/Wait")(b"", timeout=0.2)
        assert type(from_rpc(caught.value)) is errors.DeadlineExceeded
    await asyncio.wait_for(echo.cancelled.wait(), 5)
    assert [line["code"] for line in lines(logged) if line["event"] == "call"] == ["DEADLINE_EXCEEDED"]


async def test_draining_ends_watches_and_leaves_other_streams_alone(echo: Echo) -> None:
    async with serving(echo) as (address, calls), client.channel(address) as opened:
        watch, stream = (opened.unary_stream(f"/test.Echo/{name}")(b"") for name in ("WatchCount", "Count"))
        await watch.read()
        await stream.read()
        calls.end_watches()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await watch.read() is not grpc.aio.EOF:
                pass
        assert type(from_rpc(caught.value)) is errors.ShuttingDown
        assert await stream.read() is not grpc.aio.EOF
        late = opened.unary_stream("/test.Echo/WatchCount")(b"")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await late.read()
        assert type(from_rpc(caught.value)) is errors.ShuttingDown
        stream.cancel()


async def test_nobody_there_is_unavailable_and_names_what_to_check() -> None:
    async with client.channel("127.0.0.1:1") as opened:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await opened.unary_unary("/test.Echo/Seen")(b"", timeout=5)
    error = from_rpc(caught.value)
    assert type(error) is errors.Unavailable
    assert error.hint


async def test_a_new_channel_does_not_inherit_the_wait_of_an_older_one_to_the_same_address(echo: Echo) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
    async with client.channel(address) as older:
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError):
                await older.unary_unary("/test.Echo/Sum")(b"1")
        async with serving(echo, address), client.channel(address) as newer:
            assert json.loads(await newer.unary_unary("/test.Echo/Seen")(b""))


async def test_an_http_proxy_in_the_environment_is_not_asked(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    async with serving(echo) as (address, _), client.channel(address) as opened:
        assert await opened.unary_unary("/test.Echo/Seen")(b"", timeout=5)
