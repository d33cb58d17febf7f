"""Which projects were deleted, told to all services, and what ingest itself keeps of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import TypeVar

from codegraft.common.v1.deleted_pb2 import DeletedProject
from codegraft.ingest.v1.project_pb2 import Project, ProjectDeletion
from services.core import log
from services.core.audit import record as audit
from services.core.auth import keyring
from services.core.auth.caller import current
from services.core.backoff import Backoff
from services.core.errors import Aborted, CodegraftError, NotFound, ResourceExists, StateUnavailable, Unavailable
from services.core.leftovers import deleted_projects
from services.core.rpc.context import request_id
from services.core.runtime import Runtime
from services.core.state import Table
from services.ingest.grants import Grants
from services.ingest.records import Tables

_LOOK = 0.5
"""Seconds between two looks at deletions that were begun."""
_PATIENCE = 2.0
"""Seconds that whoever began one is left alone with it."""
_NEVER = 60.0
"""Seconds after which one whose project is there still did not happen, and will not."""
logger = log.get(__name__)
M = TypeVar("M", DeletedProject, ProjectDeletion)


class Deletions:
    """Keeps a record for every name under which a project was deleted (services/core/leftovers.py).

    Only calls write it, and never what is missing in the state: records that were lost, or replaced by those of a
    backup, must take nothing with them. A call that is cut short has written before that it would delete; :meth:`run`
    at any replica, or the next process, ends what it began.
    """

    def __init__(self, runtime: Runtime, tables: Tables) -> None:
        self._tables, self._store = tables, runtime.store
        access = runtime.state(keyring.BUCKET)
        self._deleted = deleted_projects(access)
        self._grants = Grants(access, tables.projects, runtime.audit)
        self._begun: dict[str, tuple[ProjectDeletion, float]] = {}
        """By project, with when this process heard of it, of the monotonic clock."""

    async def run(self) -> None:
        """Ends deletions that nobody ends who began them, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            tasks.create_task(self._end_forgotten())

    @contextlib.asynccontextmanager
    async def deleting(self, project: str) -> AsyncIterator[None]:
        """Around the deletion of a project's record: all that is its goes afterwards.

        Raises:
            Aborted, StateUnavailable: it is not deleted, or not all of it is gone yet; that goes soon.
        """
        caller = current()
        by_token = caller.projects is not None and not caller.digest
        begun = ProjectDeletion(name=project, caller=caller.subject, request_id=request_id.get(), keeps_quota=by_token)
        begun.etag = await _become(self._tables.deletions, begun)
        try:
            yield
        except (NotFound, Aborted):
            await self._done(begun)
            raise
        await self._end(begun)

    async def _end(self, begun: ProjectDeletion) -> None:
        """Tells all services, and takes away what ingest itself keeps, unless there is a project of that name."""
        await self._grants.end(begun)
        if await self._tables.projects.find(begun.name) is None:
            await self._write(DeletedProject(name=begun.name))
        await self._clear(begun.name)
        await self._done(begun)

    async def _done(self, begun: ProjectDeletion) -> None:
        with audit.gathering(), contextlib.suppress(NotFound, Aborted):  # another replica did, or another call began
            await self._tables.deletions.delete(begun.name, etag=begun.etag)

    async def _follow(self) -> None:
        waits, failures = Backoff(), 0
        while True:
            try:
                async for change in self._tables.deletions.follow():
                    failures = 0
                    if change.message is None:
                        self._begun.pop(change.name, None)
                    else:
                        self._begun[change.name] = change.message, time.monotonic()
            except StateUnavailable as error:
                logger.warning("deletions cannot be followed", error=error.message)
            await asyncio.sleep(waits.delay(failures))
            failures += 1

    async def _end_forgotten(self) -> None:
        while True:
            await asyncio.sleep(_LOOK)
            for begun, heard in list(self._begun.values()):
                waited = time.monotonic() - heard
                if waited < _PATIENCE:
                    continue
                try:
                    if await self._tables.projects.find(begun.name) is None:
                        await self._end(begun)
                        logger.info("ended the deletion of a project that was cut short", project=begun.name)
                    elif waited > _NEVER:
                        await self._done(begun)
                except CodegraftError as error:
                    logger.warning("a deletion cannot be ended", project=begun.name, error=error.message)

    async def begins(self, project: Project) -> None:
        """A project is about to be made: nothing of one of its name before is its own.

        Before it is made, so that no service ever finds it called deleted. What is left at ingest tells of a deletion
        that was cut short before it was told.

        Raises:
            ResourceExists: it is there.
            Aborted, StateUnavailable: it is not written.
        """
        if await self._tables.projects.find(project.name) is not None:
            raise ResourceExists(f"{project.name} exists already", field="name", hint="Choose another id.")
        if (begun := await self._tables.deletions.find(project.name)) is not None:
            await self._end(begun)
        if await self._clear(project.name) or await self._deleted.find(project.name) is not None:
            await self._write(DeletedProject(name=project.name, successor_create_time=project.create_time))

    async def _write(self, now: DeletedProject) -> None:
        await _become(self._deleted, now)

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


async def _become(table: Table[M], now: M) -> str:
    """Writes a record, whether there is one or not; its etag."""

    def become(record: M) -> None:
        record.CopyFrom(now)

    with audit.gathering():  # no caller's change
        try:
            stored = await table.create(now)
        except ResourceExists:
            stored = await table.mutate(now.name, become)
    return stored.etag
