"""What a job queue promises. It only says which job may need a worker; who owns a job, the job's own status says."""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

ACK_WAIT = timedelta(seconds=30)
"""A job whose taker is silent for so long is handed out again."""


class Delivery(Protocol):
    """A job handed to one taker. Ends with exactly one of ack, nak and dead_letter.

    Every method raises StateUnavailable when the server does not answer; the job is then handed out again.
    """

    @property
    def name(self) -> str:
        """Resource name of the job."""
        ...

    @property
    def attempt(self) -> int:
        """How often the job was handed out since it was submitted, this time included."""
        ...

    @property
    def traceparent(self) -> str:
        """W3C trace context of what submitted the job; empty when that was not traced."""
        ...

    async def ack(self) -> None:
        """Takes the job off the queue."""
        ...

    async def nak(self, delay: float = 0) -> None:
        """Gives the job back, to be handed out again after ``delay`` seconds."""
        ...

    async def in_progress(self) -> None:
        """Says that the taker is alive: it has another ack wait."""
        ...

    async def dead_letter(self, why: str) -> None:
        """Takes the job off the queue and keeps its name and the reason among the dead letters."""
        ...


class JobQueue(Protocol):
    """Names of jobs that wait for a worker, first in, first out for each kind."""

    async def submit(self, kind: str, name: str) -> None:
        """Puts a job on the queue; does nothing while it is there or with a taker.

        Args:
            kind: what workers ask for: "scan", "run".

        Raises:
            StateUnavailable: the server does not answer; the runner's reconciliation submits the job later.
        """
        ...

    async def take(self, kind: str, timeout: float) -> Delivery | None:  # noqa: ASYNC109  the server keeps the time
        """The next job of that kind; None when there is none within ``timeout`` seconds.

        Raises:
            StateUnavailable: the server does not answer.
        """
        ...
