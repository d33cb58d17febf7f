"""What a check is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Result(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    result: Result
    found: str
    hint: str = ""
    """How to mend it; empty where nothing is wrong."""


def ok(name: str, found: str) -> Check:
    """All is well."""
    return Check(name, Result.OK, found)


def warning(name: str, found: str, hint: str) -> Check:
    """It works, but should be looked at."""
    return Check(name, Result.WARNING, found, hint)


def failed(name: str, found: str, hint: str) -> Check:
    """It does not work, or not safely."""
    return Check(name, Result.FAILED, found, hint)
