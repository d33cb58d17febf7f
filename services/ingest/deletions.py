"""Which projects were deleted, told to all services, and what ingest itself keeps of them."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime

from codegraft.common.v1.deleted_pb2 import DeletedProject
from codegraft.ingest.v1.project_pb2 import Project
from services.core import log
from services.core.audit import record as audit
from services.core.auth import keyring
from services.core.backoff import Backoff
from services.core.errors import Aborted, CodegraftError, EtagMismatch, NotFound, ResourceExists, Unavailable
from services.core.leftovers import deleted_projects
from services.core.runtime import Runtime
from services.ingest.records import Tables

_TRIES = 20
logger = log.get(__name__)


class Deletions:
    """Keeps a record for every name under which a project was deleted (services/core/leftovers.py).

    A call that deletes or makes a project writes it; who follows the projects does where that call was cut short. Only
    what was deleted counts, never what is missing: state that was lost must take nothing with it.
    """

    def __init__(self, runtime: Runtime, tables: Tables) -> None:
        self._tables, self._store = tables, runtime.store
        self._deleted = deleted_projects(runtime.state(keyring.BUCKET))

    async def run(self) -> None:
        """Follows the projects until cancelled."""
        waits, failures = Backoff(), 0
        while True:
            try:
                async for change in self._tables.projects.follow():
                    await self.note(change.name, deleted=change.message is None)
                    failures = 0
            except CodegraftError as error:
                logger.warning("deletions of projects cannot be told", error=error.message)
            await asyncio.sleep(waits.delay(failures))
            failures += 1

    async def note(self, project: str, *, deleted: bool = False) -> None:
        """Brings a project's record to what is true now; there is none for a name that was never deleted.

        Raises:
            Aborted, StateUnavailable: it is not written.
        """
        for _ in range(_TRIES):
            there = await self._deleted.find(project)
            now = _record(project, await self._tables.projects.find(project))
            if there is None and not (deleted and not now.HasField("successor_create_time")):
                return
            with contextlib.suppress(ResourceExists, EtagMismatch, NotFound), audit.gathering():  # no caller's change
                if there is None:
                    await self._deleted.create(now)
                elif there.successor_create_time != now.successor_create_time:
                    await self._deleted.mutate(project, lambda record, now=now: _become(record, now), etag=there.etag)  # type: ignore[misc]
                return
        raise Aborted(f"{project} is made and deleted by many at once", hint="Try again.", retry_after=1.0)

    async def began_anew(self, project: str) -> datetime | None:
        """When a project was made whose name had been another one's; None when the name never was."""
        record = await self._deleted.find(project)
        if record is None or not record.HasField("successor_create_time"):
            return None
        return record.successor_create_time.ToDatetime(UTC)

    async def clear(self, project: str) -> None:
        """Deletes what ingest keeps of a project that is not there: of one before that was deleted."""
        left = [(table, each.name) for table in self._tables.of_project for each in await table.all(f"{project}/")]
        manifests = await self._snapshots_of(project)
        # After they were read: what a new project of that name may have by now is not among them.
        if await self._tables.projects.find(project) is not None:
            return
        for table, name in left:
            with contextlib.suppress(NotFound):
                await table.delete(name)
        for key in manifests:
            with contextlib.suppress(Unavailable):
                await self._store.delete(key)

    async def _snapshots_of(self, project: str) -> list[str]:
        """Keys of the manifests of snapshots; none while the store is away, and then they are left to the collection of
        garbage."""
        try:
            return [key async for key in self._store.list(f"{project}/snapshots/") if key.endswith("/manifest.json")]
        except Unavailable as error:
            logger.warning("snapshots of a deleted project stay", project=project, error=error.message)
            return []


def _record(name: str, project: Project | None) -> DeletedProject:
    record = DeletedProject(name=name)
    if project is not None:
        record.successor_create_time.CopyFrom(project.create_time)
    return record


def _become(record: DeletedProject, now: DeletedProject) -> None:
    record.CopyFrom(now)
