"""What ingest itself keeps for projects and keys, in bytes: its records, and their sums for the other services."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from codegraft.access.v1.quota_pb2 import ProjectStorage, StoredPlaces
from codegraft.ingest.v1.source_pb2 import Source
from codegraft.ingest.v1.upload_pb2 import Upload
from services.core import log, names
from services.core.auth import keyring
from services.core.auth.caller import ANYBODY
from services.core.backoff import Backoff
from services.core.errors import CodegraftError, StateUnavailable
from services.core.quota.storage import Stored, kind_of
from services.core.runtime import Runtime
from services.core.state import Table
from services.ingest.records import Tables

_FRESH = 10.0
"""Seconds for which a project's artifacts are not counted again: they grow by no call that is refused here."""
_TELL = 0.5
"""Seconds between two rounds of telling sums: a burst of uploads is one."""
logger = log.get(__name__)


class Storage:
    """Storage as ingest counts it.

    Attributes:
        stored: what is used.
        places: room for uploads and sources.
    """

    def __init__(self, runtime: Runtime, tables: Tables) -> None:
        self._tables = tables
        self._changed: set[str] = set()
        """Projects whose sums may be others now."""
        self.stored = Stored(runtime.store, self.records, _FRESH)
        self.places = self.stored.places(runtime.quotas, runtime.state(keyring.BUCKET), self._settle)

    async def records(self, owner: str, there: StoredPlaces) -> Mapping[str, int]:
        """Bytes of a project's uploads and sources; of anybody else those of what it made itself."""
        of_project = owner.startswith("projects/")
        prefix = f"{owner}/" if of_project else ""
        uploads = [each for each in await self._tables.uploads.all(prefix) if of_project or each.creator == owner]
        sources = [each for each in await self._tables.sources.all(prefix) if of_project or each.creator == owner]
        return {each.name: each.size for each in uploads} | {each.name: each.byte_count for each in sources}

    async def tell(self) -> None:
        """Keeps the sums of projects up to date, until cancelled. All replicas do it, and come to the same."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow(self._tables.uploads))
            tasks.create_task(self._follow(self._tables.sources))
            tasks.create_task(self._write())

    async def _follow(self, table: Table[Upload] | Table[Source]) -> None:
        waits, failures = Backoff(), 0
        while True:
            try:
                async for change in table.follow():
                    failures = 0
                    self._changed.add(names.project_of(change.name))
            except StateUnavailable as error:
                logger.warning("what is stored cannot be followed", error=error.message)
            await asyncio.sleep(waits.delay(failures))
            failures += 1

    async def _write(self) -> None:
        looked = False
        while True:
            await asyncio.sleep(_TELL)
            try:
                if not looked:  # what became empty while nobody told has nothing that could be followed
                    self._changed |= set(await self.places.owners())
                    looked = True
                for project in list(self._changed):
                    self._changed.discard(project)  # before it is counted: what changes meanwhile counts next time
                    try:
                        await self.places.settle(project)
                    except CodegraftError:
                        self._changed.add(project)
                        raise
            except CodegraftError as error:  # NATS is away, or many write
                logger.warning("what is stored cannot be told", error=error.message)

    async def _settle(self, owner: str, after: StoredPlaces) -> None:
        """What the records come to, in the very write in which a claim ends: nobody counts a thing twice, or not."""
        found = await self.records(owner, after)
        if owner.startswith("projects/"):
            recorded = ProjectStorage()
            for name, size in found.items():
                kind = kind_of(name)
                setattr(recorded, kind, getattr(recorded, kind) + size)
            if recorded.ListFields() or after.HasField("recorded"):
                after.recorded.CopyFrom(recorded)
        for place in after.places:
            if kind_of(place.name) in ("uploads", "sources"):
                place.counted = min(place.amount, found.get(place.name, 0))


def owners_of(project: str, creator: str) -> list[str]:
    """Whose quotas a thing has to fit that is stored when nobody calls any more."""
    return [project, creator] if creator not in ("", ANYBODY.subject) else [project]
