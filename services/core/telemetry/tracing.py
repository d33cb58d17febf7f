"""Traces: a span for each RPC, message, job and long step, and the way they travel between processes.

A trace travels as W3C traceparent (https://www.w3.org/TR/trace-context/): in gRPC metadata and HTTP headers, in the
headers of NATS messages (events, work, writes to KV). Its ids are there whether spans are recorded or not, for every
line of log has them; recorded they are once :func:`use` was called, see process.py.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

from opentelemetry import trace
from opentelemetry.context import Context, attach
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    TracerProvider,
)

from services.core.errors import CodegraftError

HEADER = "traceparent"

Attributes = Mapping[str, str | int | float]
_NONE: Attributes = MappingProxyType({})

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_tracer: Tracer | None = None


def use(provider: TracerProvider | None) -> None:
    """Records spans with this provider from now on; None records none."""
    global _tracer
    _tracer = None if provider is None else provider.get_tracer("codegraft")


def is_on() -> bool:
    """Whether spans are recorded."""
    return _tracer is not None


def traceparent() -> str:
    """The current span, for a message that is sent now; empty outside of any."""
    return header(trace.get_current_span())


def header(span: Span) -> str:
    """A span as others are told of it: its traceparent."""
    return _header(span.get_span_context())


def begin(
    name: str, kind: SpanKind = SpanKind.INTERNAL, parent: str | None = None, attributes: Attributes = _NONE
) -> Span:
    """A span that is not current, and that the caller ends. While none are recorded it is only a new id in the trace,
    and nothing outside of one.

    Args:
        parent: a traceparent; one that is empty or broken begins a trace. None continues the current span.
    """
    above = trace.get_current_span().get_span_context() if parent is None else _parsed(parent)
    if _tracer is not None:
        context = trace.set_span_in_context(NonRecordingSpan(above)) if above.is_valid else Context()
        return _tracer.start_span(name, context, kind, dict(attributes))
    if parent is None and not above.is_valid:
        return INVALID_SPAN
    return NonRecordingSpan(_child(above))


def enter(span: Span) -> None:
    """Makes a span the current one of this task, and of those that it starts, to its end."""
    attach(trace.set_span_in_context(span))


@contextmanager
def under(parent: str) -> Iterator[None]:
    """Within the block spans belong to one elsewhere; an empty traceparent changes nothing."""
    above = _parsed(parent)
    if not above.is_valid:
        yield
        return
    with trace.use_span(NonRecordingSpan(above), record_exception=False, set_status_on_exception=False):
        yield


def failed(error: BaseException) -> None:
    """Says of the current span that it failed, though no error comes out of its block."""
    _mark(trace.get_current_span(), _reason(error))


def end(span: Span, error: BaseException | None = None, *, reason: str = "") -> None:
    """Ends a span; one that failed says why by the error's reason. Its text is in the log, without secrets.

    Args:
        reason: stands for the error where there is only its reason.
    """
    _mark(span, _reason(error) if error is not None else reason)
    span.end()


@contextmanager
def span(
    name: str, kind: SpanKind = SpanKind.INTERNAL, parent: str | None = None, attributes: Attributes = _NONE
) -> Iterator[Span]:
    """A span that is the current one within the block; see :func:`begin`."""
    begun = begin(name, kind, parent, attributes)
    with trace.use_span(begun, end_on_exit=False, record_exception=False, set_status_on_exception=False):
        try:
            yield begun
        except BaseException as error:
            end(begun, error)
            raise
    end(begun)


def took(
    name: str, seconds: float, *, parent: str | None = None, links: Sequence[str] = (), attributes: Attributes = _NONE
) -> str:
    """Records what has just ended and was measured already; its traceparent, empty while nothing is recorded.

    Args:
        seconds: how long it took.
        links: traceparents of spans elsewhere that belong to it.
    """
    if _tracer is None:
        return ""
    above = trace.get_current_span().get_span_context() if parent is None else _parsed(parent)
    context = trace.set_span_in_context(NonRecordingSpan(above)) if above.is_valid else Context()
    now = time.time_ns()
    begun = _tracer.start_span(
        name,
        context,
        attributes=dict(attributes),
        links=[Link(found) for one in links if (found := _parsed(one)).is_valid],
        start_time=now - max(0, round(seconds * 1e9)),
    )
    begun.end(now)
    return _header(begun.get_span_context())


def _reason(error: BaseException) -> str:
    return error.reason if isinstance(error, CodegraftError) else type(error).__name__


def _mark(span: Span, reason: str) -> None:
    if reason:
        span.set_status(Status(StatusCode.ERROR, reason))
        span.set_attribute("error.type", reason)


def _parsed(header: str) -> SpanContext:
    match = _TRACEPARENT.fullmatch(header)
    # Of zeros the specification calls it invalid, and so does SpanContext.
    trace_id, span_id, flags = (int(part, 16) for part in match.groups()) if match else (0, 0, 0)
    return SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))


def _child(above: SpanContext) -> SpanContext:
    """A new span in that trace, or in a new one that may be recorded by others."""
    if above.is_valid:
        return SpanContext(above.trace_id, _new_id(8), is_remote=False, trace_flags=above.trace_flags)
    return SpanContext(_new_id(16), _new_id(8), is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def _new_id(size: int) -> int:
    return secrets.randbits(8 * size) or 1


def _header(context: SpanContext) -> str:
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
