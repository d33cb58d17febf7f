"""What belongs to the call that is being served, and travels on to the calls made for it.

A task started while a call is served inherits all of it, the deadline too: work that outlives its call belongs into
the server's background, not into such a task.
"""

from __future__ import annotations

import re
import secrets
import time
from contextvars import Context, ContextVar, copy_context

from services.core.telemetry import tracing

REQUEST_ID = "x-request-id"
AUTHORIZATION = "authorization"
TRACEPARENT = tracing.HEADER
VERSION = "x-codegraft-version"
"""In the first metadata of every answer: the service's release."""
TIME = "x-codegraft-time"
"""Likewise: its clock, in seconds since 1970."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

request_id: ContextVar[str] = ContextVar("request_id", default="")
authorization: ContextVar[str] = ContextVar("authorization", default="")
"""Credentials of the person for whom calls are made, where somebody else checks them: only the gateway sets it."""
_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)

MARGIN = 0.05
"""Seconds of the caller's deadline that are kept back, so that our answer to its end arrives before it gives up."""


def set_deadline(remaining: float | None) -> None:
    """Notes that the call being served ends after so many seconds; None means never."""
    _deadline.set(None if remaining is None else time.monotonic() + remaining)


def without_deadline() -> Context:
    """The context as it is, for a task that outlives the call being served."""
    copied = copy_context()
    copied.run(_deadline.set, None)
    return copied


def remaining() -> float | None:
    """Seconds that a call made now may take; None without a deadline, never negative."""
    deadline = _deadline.get()
    return None if deadline is None else max(0.0, deadline - time.monotonic() - MARGIN)


def shortened(timeout: float | None) -> float | None:
    """The timeout, or what is left of the deadline of the call being served when that is less; None means never."""
    left = remaining()
    if timeout is None or left is None:
        return left if timeout is None else timeout
    return min(timeout, left)


def outgoing() -> tuple[tuple[str, str | bytes], ...]:
    """Metadata for calls made now: request id, trace and credentials of the call being served; empty outside of one."""
    values = (
        (REQUEST_ID, request_id.get()),
        (TRACEPARENT, tracing.traceparent()),
        (AUTHORIZATION, authorization.get()),
    )
    return tuple((key, value) for key, value in values if value)


def accept_request_id(given: str) -> str:
    """The caller's request id when it is short and printable, else a new one (log lines must stay harmless)."""
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
