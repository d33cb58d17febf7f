"""How jobs end, for callers that wait for them."""

from __future__ import annotations

from codegraft.common.v1.job_pb2 import JobState, JobStatus
from services.core.errors import JobCancelled, by_reason

FINAL = frozenset({JobState.JOB_STATE_SUCCEEDED, JobState.JOB_STATE_FAILED, JobState.JOB_STATE_CANCELLED})
"""States that a job never leaves."""


def raise_failure(status: JobStatus, name: str) -> None:
    """Raises what a job ended with unless it succeeded.

    Raises:
        JobCancelled: it was cancelled.
        CodegraftError: it failed; the class that belongs to its reason, with its hint.
    """
    if status.state == JobState.JOB_STATE_FAILED:
        raise by_reason(status.failure.reason)(status.failure.message, hint=status.failure.hint)
    if status.state == JobState.JOB_STATE_CANCELLED:
        raise JobCancelled(f"{name} was cancelled")
