"""Publishes an event for every state that a job reaches, whichever process brought it there.

The record is the truth; this only follows it. Several replicas may announce the same: the event's id is the same, too.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

from google.protobuf.message import Message

from codegraft.common.v1.job_pb2 import JobState
from services.core import log
from services.core.errors import StateUnavailable
from services.core.events import EventBus
from services.core.jobs.states import is_final, status_of
from services.core.jobs.tally import Tally
from services.core.state.table import Table
from services.core.telemetry import metrics, tracing

logger = log.get(__name__)
M = TypeVar("M", bound=Message)


async def announce(
    kind: str, jobs: Table[M], events: EventBus, event_type: str, describe: Callable[[str, JobState], Message]
) -> None:
    """Follows the jobs until it is cancelled, and counts them. What ended before it started is no news.

    Args:
        kind: the queue's name for these jobs.
        event_type: for example ``codegraft.scanner.scan.changed.v1``.
        describe: makes the event's payload from the job's name and state.
    """
    started = datetime.now(UTC)
    announced: dict[str, tuple[int, int]] = {}
    tally = Tally(kind)
    metrics.register(tally)
    try:
        async for change in jobs.follow():
            name = change.name
            if change.message is None:
                tally.forget(name)
                continue
            status = status_of(change.message)
            tally.see(name, status)
            state = (status.epoch, status.state)
            if announced.get(name) == state:
                continue
            announced[name] = state
            if is_final(status):
                del announced[name]
                if status.end_time.ToDatetime(tzinfo=UTC) < started:
                    continue
            try:
                payload = describe(name, status.state)
                with tracing.under(change.traceparent):
                    await events.publish(event_type, name, payload, id=f"{name}@{status.epoch}-{status.state}")
            except StateUnavailable as error:
                logger.warning("an event could not be published", job=name, error=str(error))
    finally:
        metrics.unregister(tally)
