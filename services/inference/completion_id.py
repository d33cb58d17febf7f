"""Ids of completions: each says when the completion was made and which version answered.

So whoever keeps nothing but the id can tell later what became of the completion (feedback.py).
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass
from datetime import timedelta

from services.core.errors import InvalidArgument

LATEST = timedelta(days=7)
"""Age of the oldest completion that is still talked about."""
_SKEW = 60.0
"""Seconds by which another replica's clock may be ahead."""
_ID = re.compile(r"([0-9a-f]{11})[0-9a-f]{21}-(base|[0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class CompletionId:
    """What an id says."""

    text: str
    time: float
    """When the completion was made, seconds since 1970."""
    adapter_sha256: str
    """The version that answered; empty for the base model."""


def draw() -> str:
    """The first part, known before the version is: milliseconds since 1970 and 84 random bits, 32 digits."""
    return f"{time.time_ns() // 1_000_000:011x}{secrets.token_hex(11)[1:]}"


def complete(drawn: str, adapter_sha256: str) -> str:
    """The whole id."""
    return f"{drawn}-{adapter_sha256 or 'base'}"


def made(text: str) -> int:
    """When the completion of a whole id was made, milliseconds since 1970."""
    return int(text[:11], 16)


def parse(text: str, *, now: float) -> CompletionId:
    """Reads an id.

    Args:
        now: seconds since 1970.

    Raises:
        InvalidArgument: it is none, or of a completion that is too old or was not made yet.
    """
    match = _ID.fullmatch(text)
    if match is None:
        raise InvalidArgument(
            f"completion_id {text[:120]!r} is not one of ours",
            field="completion_id",
            hint="Send the completion's id as it came.",
        )
    seconds = made(text) / 1000
    if not now - LATEST.total_seconds() <= seconds <= now + _SKEW:
        raise InvalidArgument(
            "the completion is too old, or not made yet",
            field="completion_id",
            hint=f"Send feedback within {LATEST.days} days.",
        )
    return CompletionId(text, seconds, match[2] if match[2] != "base" else "")
