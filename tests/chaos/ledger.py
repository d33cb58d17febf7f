"""What clients were told: the promises that have to hold whatever was killed meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from codegraft.common.v1.job_pb2 import JobStatus
from services.core.errors import DeadlineExceeded, Unavailable
from services.core.jobs import is_final

PATIENCE = 90.0
"""Seconds of outages that a client outwaits."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Seen:
    """How a job was seen at a moment."""

    at: float
    """Of the monotonic clock."""
    epoch: int
    runs: bool


@dataclass
class Job:
    """A scan or a run that was acknowledged."""

    name: str
    worker: str
    """The service that works on it."""
    request_id: str
    ask_again: Callable[[], Awaitable[str]]
    """Makes the very same call once more; the job's name."""
    seen: list[Seen] = field(default_factory=list)
    status: JobStatus = field(default_factory=JobStatus)

    def see(self, status: JobStatus) -> bool:
        """Notes how it is; whether it has ended."""
        self.status = status
        now = Seen(time.monotonic(), status.epoch, bool(status.worker))
        if not self.seen or (self.seen[-1].epoch, self.seen[-1].runs) != (now.epoch, now.runs):
            self.seen.append(now)
        return is_final(status)

    @property
    def runs(self) -> bool:
        """Whether a worker had it when it was last seen."""
        return bool(self.status.worker)

    def resumed_after(self, moment: float, until: float) -> float | None:
        """Seconds from a moment at which it ran to its next attempt; None when it did not run then, or had no other.

        Args:
            until: what happened later had other reasons.
        """
        before = [seen for seen in self.seen if seen.at <= moment]
        if not before or not before[-1].runs:
            return None
        epoch = before[-1].epoch
        return next((seen.at - moment for seen in self.seen if seen.epoch > epoch and seen.at < until), None)


@dataclass
class Ledger:
    """Everything acknowledged, by resource name."""

    projects: list[str] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    """With the content."""
    sources: dict[str, str] = field(default_factory=dict)
    """With the digest of their content, once they are READY."""
    snapshots: list[str] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    completions: int = 0
    broken: dict[str, int] = field(default_factory=dict)
    """Completions that failed, by the reason that their caller was told."""


async def insist(call: Callable[[], Awaitable[Result]]) -> Result:
    """The answer, through outages: only errors that say so are met with patience, all others are raised."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return await call()
        except (Unavailable, DeadlineExceeded):
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.2)
