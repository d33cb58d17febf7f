"""What belongs to the call that is being served, and travels on to the calls made for it."""

from __future__ import annotations

import re
import secrets
import time
from contextvars import ContextVar

REQUEST_ID = "x-request-id"
TRACEPARENT = "traceparent"
"""W3C trace context, https://www.w3.org/TR/trace-context/."""

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

request_id: ContextVar[str] = ContextVar("request_id", default="")
traceparent: ContextVar[str] = ContextVar("traceparent", default="")
_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)

MARGIN = 0.05
"""Seconds of the caller's deadline that are kept back, so that our answer to its end arrives before it gives up."""


def set_deadline(remaining: float | None) -> None:
    """Notes that the call being served ends after so many seconds; None means never."""
    _deadline.set(None if remaining is None else time.monotonic() + remaining)


def remaining() -> float | None:
    """Seconds that a call made now may take; None without a deadline, never negative."""
    deadline = _deadline.get()
    return None if deadline is None else max(0.0, deadline - time.monotonic() - MARGIN)


def accept_request_id(given: str) -> str:
    """The caller's request id when it is short and printable, else a new one (log lines must stay harmless)."""
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


def accept_traceparent(given: str) -> str:
    """The caller's trace, continued by a span of ours; a new trace when there is none."""
    match = _TRACEPARENT.fullmatch(given)
    return f"00-{match[1] if match else secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def trace_id() -> str:
    """Trace id of the call being served; empty outside of one."""
    return traceparent.get()[3:35]
