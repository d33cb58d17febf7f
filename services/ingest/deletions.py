"""Which projects were deleted, told to all services, and what ingest itself keeps of them."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime

from codegraft.common.v1.deleted_pb2 import DeletedProject
from codegraft.ingest.v1.project_pb2 import Project
from services.core import log
from services.core.audit import record as audit
from services.core.auth import keyring
from services.core.errors import NotFound, ResourceExists, Unavailable
from services.core.leftovers import deleted_projects
from services.core.runtime import Runtime
from services.ingest.records import Tables

logger = log.get(__name__)


class Deletions:
    """Keeps a record for every name under which a project was deleted (services/core/leftovers.py).

    Only calls write it, and never what is missing in the state: records that were lost, or replaced by those of a
    backup, must take nothing with them.
    """

    def __init__(self, runtime: Runtime, tables: Tables) -> None:
        self._tables, self._store = tables, runtime.store
        self._deleted = deleted_projects(runtime.state(keyring.BUCKET))

    async def ended(self, project: str) -> None:
        """A project was deleted: tells all services, and deletes what ingest itself keeps of it.

        Raises:
            Aborted, StateUnavailable: it is not written.
        """
        if await self._tables.projects.find(project) is None:
            await self._write(DeletedProject(name=project))
        await self._clear(project)

    async def begins(self, project: Project) -> None:
        """A project is about to be made: nothing of one of its name before is its own.

        Before it is made, so that no service ever finds it called deleted. What is left at ingest tells of a deletion
        that was cut short before it was told.

        Raises:
            Aborted, StateUnavailable: it is not written.
        """
        if await self._tables.projects.find(project.name) is not None:
            return
        if await self._clear(project.name) or await self._deleted.find(project.name) is not None:
            await self._write(DeletedProject(name=project.name, successor_create_time=project.create_time))

    async def _write(self, now: DeletedProject) -> None:
        def become(record: DeletedProject) -> None:
            record.CopyFrom(now)

        with audit.gathering():  # no caller's change
            try:
                await self._deleted.create(now)
            except ResourceExists:
                await self._deleted.mutate(now.name, become)

    async def began_anew(self, project: str) -> datetime | None:
        """When a project was made whose name had been another one's; None when the name never was."""
        record = await self._deleted.find(project)
        if record is None or not record.HasField("successor_create_time"):
            return None
        return record.successor_create_time.ToDatetime(UTC)

    async def _clear(self, project: str) -> bool:
        """Deletes what ingest keeps of a project that is not there; whether there was anything."""
        left = [(table, each.name) for table in self._tables.of_project for each in await table.all(f"{project}/")]
        manifests = await self._snapshots_of(project)
        # After they were read: what a new project of that name may have by now is not among them.
        if await self._tables.projects.find(project) is not None:
            return False
        for table, name in left:
            with contextlib.suppress(NotFound):
                await table.delete(name)
        for key in manifests:
            with contextlib.suppress(Unavailable):
                await self._store.delete(key)
        return bool(left or manifests)

    async def _snapshots_of(self, project: str) -> list[str]:
        """Keys of the manifests of snapshots; none while the store is away, and then they are left to the collection of
        garbage."""
        try:
            return [key async for key in self._store.list(f"{project}/snapshots/") if key.endswith("/manifest.json")]
        except Unavailable as error:
            logger.warning("snapshots of a deleted project stay", project=project, error=error.message)
            return []
