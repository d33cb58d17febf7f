"""Places of jobs: those that are queued or running, of a project or of who made them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

from google.protobuf.message import Message

from codegraft.access.v1.quota_pb2 import StoredPlaces
from codegraft.common.v1.job_pb2 import JOB_STATE_QUEUED, JOB_STATE_RUNNING, JobStatus
from services.core.quota.limits import Kind
from services.core.quota.places import Places
from services.core.quota.quotas import Quotas
from services.core.state import StateStore, Table

_UNKNOWN = 60.0
"""Seconds after which to look again, while no running job can say when it ends."""


class Job(Protocol):
    """What runs and scans have in common."""

    @property
    def name(self) -> str: ...
    @property
    def creator(self) -> str: ...
    @property
    def status(self) -> JobStatus: ...


J = TypeVar("J", bound=Message)


def places(quotas: Quotas, kind: Kind, state: StateStore, table: Table[J]) -> Places:
    """The places of one kind of job.

    Args:
        state: the bucket of the table.
        table: of messages that have the fields of :class:`Job`.
    """

    async def open_jobs(owner: str) -> list[Job]:
        of_project = owner.startswith("projects/")
        found: list[Job] = list(await table.all(f"{owner}/" if of_project else ""))  # type: ignore[arg-type]
        return [
            job
            for job in found
            if job.status.state in (JOB_STATE_QUEUED, JOB_STATE_RUNNING) and (of_project or job.creator == owner)
        ]

    async def used(owner: str, there: StoredPlaces) -> Mapping[str, int]:
        return {job.name: 1 for job in await open_jobs(owner)}

    async def retry(owner: str) -> float:
        """Seconds until the first of them ends, by its own word."""
        statuses = [job.status for job in await open_jobs(owner)]
        ends = [one.progress.eta_seconds for one in statuses if one.progress.HasField("eta_seconds")]
        return max(min(ends, default=_UNKNOWN), 1.0)

    return Places(quotas, kind, state, used, retry=retry)
