"""The life of a job as one table, and the few ways in which a status may change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, cast

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from codegraft.common.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_FAILED,
    JOB_STATE_PAUSED,
    JOB_STATE_QUEUED,
    JOB_STATE_RUNNING,
    JOB_STATE_SUCCEEDED,
    JOB_STATE_UNSPECIFIED,
    JobState,
    JobStatus,
)
from services.core.errors import InvalidTransition

TRANSITIONS = MappingProxyType(
    {
        JOB_STATE_UNSPECIFIED: frozenset({JOB_STATE_QUEUED}),
        JOB_STATE_QUEUED: frozenset({JOB_STATE_RUNNING, JOB_STATE_PAUSED, JOB_STATE_CANCELLED}),
        # Back to QUEUED: its worker was lost or shut down, or the attempt failed and another one is due.
        JOB_STATE_RUNNING: frozenset(
            {JOB_STATE_QUEUED, JOB_STATE_PAUSED, JOB_STATE_SUCCEEDED, JOB_STATE_FAILED, JOB_STATE_CANCELLED}
        ),
        JOB_STATE_PAUSED: frozenset({JOB_STATE_QUEUED, JOB_STATE_CANCELLED}),
        JOB_STATE_SUCCEEDED: frozenset[JobState](),
        JOB_STATE_FAILED: frozenset[JobState](),
        JOB_STATE_CANCELLED: frozenset[JobState](),
    }
)
"""Where a job can go from each state."""


def is_final(status: JobStatus) -> bool:
    """Whether the job has ended."""
    return not TRANSITIONS[status.state]


def new_status(now: datetime | None = None) -> JobStatus:
    """The status of a job that was just created: QUEUED."""
    status = JobStatus()
    advance(status, JOB_STATE_QUEUED, now)
    return status


def advance(status: JobStatus, to: JobState, now: datetime | None = None) -> None:
    """Takes the job to another state and keeps its times; a job that does not run has no worker and no lease.

    Raises:
        InvalidTransition: the table does not allow it; the status is unchanged.
    """
    if to not in TRANSITIONS[status.state]:
        raise InvalidTransition(
            f"the job is {_word(status.state)} and cannot become {_word(to)}",
            hint="A job that has ended stays as it is; create a new one.",
        )
    moment = _timestamp(now or datetime.now(UTC))
    if status.state == JOB_STATE_UNSPECIFIED:
        status.create_time.CopyFrom(moment)
    if to == JOB_STATE_RUNNING and not status.HasField("start_time"):
        status.start_time.CopyFrom(moment)
    status.state = to
    if to != JOB_STATE_RUNNING:
        status.ClearField("worker")
        status.ClearField("lease_expire_time")
    if to == JOB_STATE_PAUSED or is_final(status):
        status.pause_requested = False  # the wish is granted, or too late
    if is_final(status):
        status.end_time.CopyFrom(moment)


def claim(status: JobStatus, worker: str, lease: timedelta, now: datetime | None = None) -> None:
    """Gives a queued job, or one whose lease has expired, to a worker: the epoch moves on, the old worker is fenced.

    Raises:
        InvalidTransition: the job has ended, or another worker's lease is valid.
    """
    now = now or datetime.now(UTC)
    if lease_expired(status, now):
        advance(status, JOB_STATE_QUEUED, now)
    advance(status, JOB_STATE_RUNNING, now)
    status.epoch += 1
    status.attempt += 1
    status.worker = worker
    renew(status, lease, now)


def renew(status: JobStatus, lease: timedelta, now: datetime | None = None) -> None:
    """Moves the end of the lease to ``lease`` from now."""
    status.lease_expire_time.CopyFrom(_timestamp((now or datetime.now(UTC)) + lease))


def lease_left(status: JobStatus, now: datetime | None = None) -> timedelta:
    """How long the worker of a running job may stay silent; zero or less once the lease has expired."""
    return status.lease_expire_time.ToDatetime(tzinfo=UTC) - (now or datetime.now(UTC))


def lease_expired(status: JobStatus, now: datetime | None = None) -> bool:
    """Whether the job runs by its state, but its worker was not heard of for a whole lease."""
    return status.state == JOB_STATE_RUNNING and lease_left(status, now) <= timedelta(0)


def request_cancel(status: JobStatus, now: datetime | None = None) -> None:
    """Cancels a waiting job at once, asks the worker of a running one to stop, and leaves one that has ended alone."""
    if status.state in (JOB_STATE_QUEUED, JOB_STATE_PAUSED):
        status.cancel_requested = True
        advance(status, JOB_STATE_CANCELLED, now)
    elif not is_final(status):
        status.cancel_requested = True


def request_pause(status: JobStatus, now: datetime | None = None) -> None:
    """Pauses a queued job at once, asks the worker of a running one to stop, and leaves a paused one alone.

    Raises:
        InvalidTransition: the job has ended, or is about to be cancelled.
    """
    if status.state == JOB_STATE_RUNNING and not status.cancel_requested:
        status.pause_requested = True
    elif status.state != JOB_STATE_PAUSED:
        _refuse_ended(status)
        advance(status, JOB_STATE_PAUSED, now)


def request_resume(status: JobStatus, now: datetime | None = None) -> None:
    """Queues a paused job, and takes back a pause that was asked for; a job that waits or runs is left alone.

    Raises:
        InvalidTransition: the job has ended.
    """
    _refuse_ended(status)
    status.pause_requested = False
    if status.state == JOB_STATE_PAUSED:
        advance(status, JOB_STATE_QUEUED, now)


def _refuse_ended(status: JobStatus) -> None:
    if is_final(status) or status.cancel_requested:
        state = "about to be CANCELLED" if not is_final(status) else _word(status.state)
        raise InvalidTransition(
            f"the job is {state}: it can neither pause nor go on",
            field="name",
            hint="A job that has ended stays as it is; create a new one.",
        )


def status_of(job: Message) -> JobStatus:
    """The ``status`` field that every job message has."""
    return cast(JobStatus, cast(Any, job).status)


def _timestamp(moment: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp


def _word(state: JobState) -> str:
    return JobState.Name(state).removeprefix("JOB_STATE_")
