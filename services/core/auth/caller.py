"""Who a call comes from: one subject with one role in some projects."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import IntEnum


class Role(IntEnum):
    """What a caller may do; each includes those before it. The numbers are those of codegraft.access.v1.Role."""

    READER = 1
    """Looks at everything but the weights of adapters."""
    COMPLETER = 2
    """Asks for completions."""
    CONTRIBUTOR = 3
    """Adds sources, scans, trains, downloads adapters."""
    OPERATOR = 4
    """Everything."""


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller."""

    subject: str
    """``keys/{key}``, or issuer and subject of a token."""
    role: Role
    projects: frozenset[str] | None
    """``projects/{project}`` each; None for all projects, those to come too."""
    expires: float | None = None
    """When the key or the token ends, in seconds since 1970."""
    is_service: bool = False
    """Another service, with a key that the settings gave it: it works for all projects, and no quota is its."""
    digest: bytes = field(default=b"", repr=False)
    """SHA-256 of the API key's secret: which of a key's secrets it came with."""

    def covers(self, projects: frozenset[str] | None) -> bool:
        """Whether all of these projects (None: all that there are) are the caller's."""
        return self.projects is None or (projects is not None and projects <= self.projects)


ANYBODY = Caller("anonymous", Role.OPERATOR, None)
"""Every caller of a service whose authentication is off, which only loopback can reach."""

_current: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)


def current() -> Caller:
    """Who makes the call that is being served."""
    return _current.get()


def set_current(caller: Caller) -> None:
    """Notes who makes the call being served; for the interceptor, and for tests."""
    _current.set(caller)
