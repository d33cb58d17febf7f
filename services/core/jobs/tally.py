"""How many jobs wait, run and pause, and since when the first one waits: for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from codegraft.common.v1.job_pb2 import JOB_STATE_PAUSED, JOB_STATE_QUEUED, JOB_STATE_RUNNING, JobStatus
from services.core.telemetry.figures import JOBS, OLDEST

_STATES = {JOB_STATE_QUEUED: "QUEUED", JOB_STATE_RUNNING: "RUNNING", JOB_STATE_PAUSED: "PAUSED"}


class Tally(Collector):
    """The jobs of one kind that have not ended, as they are seen.

    Args:
        kind: the queue's name for these jobs.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._jobs: dict[str, tuple[str, float]] = {}

    def see(self, name: str, status: JobStatus) -> None:
        """Notes the state of a job."""
        if status.state in _STATES:
            self._jobs[name] = (_STATES[status.state], status.create_time.ToNanoseconds() / 1e9)
        else:
            self.forget(name)

    def forget(self, name: str) -> None:
        """Notes that a job has ended, or was deleted."""
        self._jobs.pop(name, None)

    def collect(self) -> Iterable[Metric]:
        """Called from the scrape's thread."""
        jobs = list(self._jobs.values())
        counts = Counter(state for state, _ in jobs)
        yield JOBS.read(((self._kind, state), counts[state]) for state in _STATES.values())
        waiting = [created for state, created in jobs if state == "QUEUED"]
        yield OLDEST.read([((self._kind,), min(waiting, default=0.0))])
