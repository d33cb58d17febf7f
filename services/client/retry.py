"""When a call may be made again, and how long to wait before."""

from __future__ import annotations

from services.core.backoff import Backoff
from services.core.errors import CodegraftError, ResourceExhausted, Unavailable

ATTEMPTS = 5
"""Tries of a call that may be repeated, the first included: about three seconds of an outage are bridged."""
LONGEST_RETRY_AFTER = 10.0
"""Seconds; a service that asks for more patience gets its error passed on instead."""

_BACKOFF = Backoff()


def will_pass(error: CodegraftError) -> bool:
    """Whether the same call may succeed within seconds: an outage, or a full queue that says when to come back."""
    if (error.retry_after or 0.0) > LONGEST_RETRY_AFTER:
        return False
    return isinstance(error, Unavailable) or (isinstance(error, ResourceExhausted) and error.retry_after is not None)


def delay(error: CodegraftError, attempt: int) -> float:
    """Seconds to wait after the given attempt (from 0) failed.

    The backoff comes on top of what the service asks for: callers that were told the same time must not come together.
    """
    return (error.retry_after or 0.0) + _BACKOFF.delay(attempt)
