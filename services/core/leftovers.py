"""Lets go what a service keeps of projects that were deleted, so that a new project of the same name finds nothing.

Ingest says which those are in the bucket that every service follows (services/ingest/deletions.py). A service that is
away at that moment reads it when it is back. Every replica lets go, and comes to the same.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
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
"""Lets go what is older than a moment (seconds since 1970, infinite for all) of a project; whether that was all."""
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
        self._due: dict[str, None] = {}
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
                    self._due[change.name] = None
                    self._news.set()
            except StateUnavailable as error:
                logger.warning("deleted projects cannot be followed", error=error.message)
            await asyncio.sleep(waits.delay(failures))
            failures += 1

    async def _work(self) -> None:
        failures = 0
        while True:
            left = list(self._due)
            self._due.clear()
            self._news.clear()
            again = [project for project in left if not await self._try(project)]
            self._due |= dict.fromkeys(again)
            failures = failures + 1 if again else 0
            try:
                async with asyncio.timeout(_WAITS.delay(failures - 1) if again else None):
                    await self._news.wait()
            except TimeoutError:
                pass

    async def _try(self, project: str) -> bool:
        try:
            record = await self._table.find(project)  # as it is now: there may be a new project meanwhile
            if record is None:
                return True
            alive = record.HasField("successor_create_time")
            before = record.successor_create_time.ToNanoseconds() / 1e9 - _APART if alive else math.inf
            return await self._forget(project, before)
        except CodegraftError as error:
            logger.warning("what is left of a deleted project has to go", project=project, error=error.message)
            return False


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


async def remove(store: ObjectStore, prefix: str) -> None:
    """Removes the objects under a prefix. What their manifests name is garbage from then on."""
    for key in [key async for key in store.list(prefix)]:
        await store.delete(key)
