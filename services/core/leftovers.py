"""Lets go what a service keeps of projects that were deleted, so that a new project of the same name finds nothing.

Ingest says which those are in the bucket that every service follows (services/ingest/deletions.py). A service that is
away at that moment reads it when it is back. Every replica lets go, and comes to the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from datetime import timedelta
from typing import TypeVar

from google.protobuf.message import Message

from codegraft.common.v1.deleted_pb2 import DeletedProject
from services.core import log
from services.core.backoff import Backoff
from services.core.errors import CodegraftError, ProjectNotFound, StateUnavailable
from services.core.jobs.states import is_final, request_cancel, status_of
from services.core.state import StateStore, Table
from services.core.store import ObjectStore

Forget = Callable[[str, float], Awaitable[bool]]
"""Lets go what is older than a moment (seconds since 1970) of a project; whether that was all."""
_APART = 60.0
"""Seconds by which clocks of machines may differ: a new project's own must never go."""
_WAITS = Backoff(first=timedelta(milliseconds=500), longest=timedelta(seconds=30))
logger = log.get(__name__)
M = TypeVar("M", bound=Message)


def deleted_projects(store: StateStore) -> Table[DeletedProject]:
    """The records, in the bucket of the keys: what every service reads already and only ingest writes."""
    return Table(store, DeletedProject, missing=ProjectNotFound)


class Leftovers:
    """See the module's docstring.

    Args:
        state: the bucket services.core.auth.keyring.BUCKET.
    """

    def __init__(self, state: StateStore, forget: Forget) -> None:
        self._table, self._forget = deleted_projects(state), forget
        self._due: dict[str, float] = {}
        """By project: what is older has to go."""
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Follows deletions until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            group.create_task(self._work())

    async def _follow(self) -> None:
        waits, failures = Backoff(), 0
        while True:
            try:
                async for change in self._table.follow():
                    failures = 0
                    if change.message is not None:
                        self._owe(change.name, _before(change.message))
                        self._news.set()
            except StateUnavailable as error:
                logger.warning("deleted projects cannot be followed", error=error.message)
            await asyncio.sleep(waits.delay(failures))
            failures += 1

    async def _work(self) -> None:
        failures = 0
        while True:
            due, self._due = self._due, {}
            self._news.clear()
            for project, before in due.items():
                if not await self._try(project, before):
                    self._owe(project, before)
            failures = failures + 1 if self._due else 0
            try:
                async with asyncio.timeout(_WAITS.delay(failures - 1) if self._due else None):
                    await self._news.wait()
            except TimeoutError:
                pass

    def _owe(self, project: str, before: float) -> None:
        self._due[project] = max(before, self._due.get(project, before))

    async def _try(self, project: str, before: float) -> bool:
        try:
            return await self._forget(project, before)
        except CodegraftError as error:
            logger.warning("what is left of a deleted project has to go", project=project, error=error.message)
            return False


def _before(record: DeletedProject) -> float:
    """What is older is of a project that was deleted: all until now, or until there is another one."""
    if record.HasField("successor_create_time"):
        return record.successor_create_time.ToNanoseconds() / 1e9 - _APART
    return time.time()


async def ended_jobs(jobs: Table[M], project: str, before: float) -> tuple[list[str], bool]:
    """A project's jobs from before a moment that have ended, by name, and whether those are all of them.

    Whoever still works on one of the others is asked to stop.
    """
    ended, all_of_them = [], True
    for name in await jobs.names(f"{project}/"):
        job = await jobs.find(name)
        if job is None or status_of(job).create_time.ToNanoseconds() / 1e9 >= before:
            continue
        if not is_final(status_of(job)):
            job = await jobs.mutate(name, lambda record: request_cancel(status_of(record)))
        if is_final(status_of(job)):
            ended.append(name)
        else:
            all_of_them = False
    return ended, all_of_them


async def remove_orphans(store: ObjectStore, prefix: str, owners: Collection[str], before: float) -> None:
    """Removes objects from before a moment whose owner has no record: of an attempt that ended before it had one.

    Args:
        prefix: of all owners' names, with a slash at the end.
        owners: those that have a record.
    """
    for found in [found async for found in store.objects(prefix)]:
        owner = prefix + found.key.removeprefix(prefix).partition("/")[0]
        if owner not in owners and found.modified.timestamp() < before:
            await store.delete(found.key)


async def remove(store: ObjectStore, prefix: str) -> None:
    """Removes the objects under a prefix. What their manifests name is garbage from then on."""
    for key in [key async for key in store.list(prefix)]:
        await store.delete(key)
