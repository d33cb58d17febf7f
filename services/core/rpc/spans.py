"""A span for every call that goes out, where spans are recorded; what goes out elsewhere only carries the trace on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from opentelemetry.trace import Span, SpanKind

from services.core.telemetry import tracing


def spans() -> list[grpc.aio.ClientInterceptor]:
    """Interceptors that record a span for every call; none while no spans are recorded."""
    return [_UnarySpan(), _StreamSpan()] if tracing.is_on() else []


class _UnarySpan(grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        span, details = _spanned(client_call_details)
        call = await continuation(details, request)
        await _end_with(call, span)
        return call


class _StreamSpan(grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        span, details = _spanned(client_call_details)
        call = await continuation(details, request)
        ending = asyncio.create_task(_end_with(call, span))
        _ending.add(ending)
        ending.add_done_callback(_ending.discard)
        return call


_ending: set[asyncio.Task[None]] = set()


def _spanned(given: grpc.aio.ClientCallDetails) -> tuple[Span, grpc.aio.ClientCallDetails]:
    """A span of the call, and its details with that span as what the server continues."""
    before = {key: value for key, value in given.metadata or ()}.get(tracing.HEADER)
    metadata = grpc.aio.Metadata(*((key, value) for key, value in given.metadata or () if key != tracing.HEADER))
    method = given.method.decode() if isinstance(given.method, bytes) else str(given.method)
    name = method.lstrip("/")
    span = tracing.begin(
        name, SpanKind.CLIENT, str(before) if before else None, {"rpc.system.name": "grpc", "rpc.method": name}
    )
    metadata.add(tracing.HEADER, tracing.header(span))
    timeout, credentials, wait = given.timeout, given.credentials, given.wait_for_ready
    return span, grpc.aio.ClientCallDetails(given.method, timeout, metadata, credentials, wait)


async def _end_with(call: Any, span: Span) -> None:
    try:
        code: grpc.StatusCode = await call.code()
    except asyncio.CancelledError:  # who waits for the call gives it up; grpc knows only of the waiting
        call.cancel()
        tracing.end(span, reason=grpc.StatusCode.CANCELLED.name)
        raise
    span.set_attribute("rpc.response.status_code", code.name)
    tracing.end(span, reason="" if code is grpc.StatusCode.OK else code.name)
