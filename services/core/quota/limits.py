"""What can be limited, and the limits of one project or key. Knows no server and no bucket."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from pydantic import BaseModel, Field

from codegraft.access.v1 import quota_pb2 as pb

UNLIMITED = -1
"""In place of a number: no limit, whatever the default says."""


class Kind(StrEnum):
    """What can be limited; the values are the fields of codegraft.access.v1.Limits."""

    REQUESTS = "requests_per_minute"
    TOKENS = "tokens_per_minute"
    STORAGE = "storage_bytes"
    RUNS = "runs"
    SCANS = "scans"


WORDS = MappingProxyType(
    {
        Kind.REQUESTS: "requests a minute",
        Kind.TOKENS: "tokens a minute",
        Kind.STORAGE: "bytes of storage",
        Kind.RUNS: "runs at once",
        Kind.SCANS: "scans at once",
    }
)
"""For people."""


class Defaults(BaseModel, frozen=True, extra="forbid"):
    """Limits where nothing was set, of the settings; unset ones are no limit."""

    requests_per_minute: int | None = Field(default=None, ge=0)
    tokens_per_minute: int | None = Field(default=None, ge=0)
    storage_bytes: int | None = Field(default=None, ge=0)
    runs: int | None = Field(default=None, ge=0)
    scans: int | None = Field(default=None, ge=0)

    def limit(self, kind: Kind) -> int | None:
        """None is no limit."""
        value: int | None = getattr(self, kind)
        return value


NONE = Defaults()
"""Limits nothing."""

Limits = Mapping[Kind, int]
"""What was set: 0 or more, or UNLIMITED; what is missing is the default's."""


def of_message(message: pb.Limits) -> Limits:
    """What the message sets."""
    return {kind: getattr(message, kind) for kind in Kind if message.HasField(kind)}


def effective(limits: Limits, defaults: Defaults) -> dict[Kind, int | None]:
    """What counts; None is no limit."""
    found: dict[Kind, int | None] = {}
    for kind in Kind:
        own = limits.get(kind)
        found[kind] = defaults.limit(kind) if own is None else None if own < 0 else own
    return found


def message_of(values: Mapping[Kind, int | None]) -> pb.Limits:
    """The message that says so; None leaves a field unset."""
    return pb.Limits(**{str(kind): value for kind, value in values.items() if value is not None})
