"""How much projects and keys have stored, counted in one way for whoever is about to store: ingest, scanner, trainer.

Uploads and sources are ingest's records. It counts them itself, and for the others keeps their sum beside the quotas
(services/ingest/storage.py). All else are artifacts, which say in their manifests how large they are. What lasts is
claimed by each service in a bucket of its own: two replicas of one never get the same last room, two services at the
very same moment may.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from pathlib import Path

from codegraft.access.v1.quota_pb2 import ProjectStorage, StorageUsage
from services.core.errors import NotFound, ProjectNotFound
from services.core.quota.limits import Kind
from services.core.quota.places import Places
from services.core.quota.quotas import Quotas
from services.core.state import StateStore, Table
from services.core.store import ObjectStore

Records = Callable[[str], Awaitable[Mapping[str, int]]]
"""Of an owner: names of uploads and sources, and their bytes."""
_CLAIM = timedelta(hours=1)
"""What is on its way keeps its room for so long, if its process dies."""
_LATER = 3600.0
"""Seconds after which to look again. Nobody knows when something is deleted."""


class Stored:
    """Counts what is stored, by resource name. What snapshots alone still hold is not counted.

    Args:
        fresh: seconds for which a project's artifacts are not looked for again.
    """

    def __init__(self, store: ObjectStore, records: Records, fresh: float = 0.0) -> None:
        self._store, self._records, self._fresh = store, records, fresh
        self._artifacts: dict[str, tuple[float, dict[str, int]]] = {}
        """By project: when they were counted, and what was found, by name."""

    async def used(self, owner: str) -> Mapping[str, int]:
        """Bytes of a project's uploads, sources and artifacts; of anybody else those of what it made itself."""
        found = await self._artifacts_of(owner) if owner.startswith("projects/") else {}
        return found | dict(await self._records(owner))

    async def usage(self, owner: str) -> StorageUsage:
        """The same, by what it is."""
        found = StorageUsage()
        for name, size in (await self.used(owner)).items():
            kind = kind_of(name)
            setattr(found, kind, getattr(found, kind) + size)
        return found

    def places(self, quotas: Quotas, state: StateStore) -> Places:
        """Room for what is about to be stored.

        Args:
            state: a bucket of the service itself.
        """
        return Places(quotas, Kind.STORAGE, state, self.used, lasts=_CLAIM, retry=_retry)

    async def _artifacts_of(self, project: str) -> dict[str, int]:
        """Bytes of snapshots' listings, datasets, adapters and training states: what their manifests say."""
        counted, known = self._artifacts.get(project, (-self._fresh, {}))
        if time.monotonic() - counted < self._fresh:
            return known
        found: dict[str, int] = {}
        async for key in self._store.list(f"{project}/"):
            name, _, file = key.rpartition("/")
            if file != "manifest.json":
                continue
            if name in known:  # a manifest never changes
                found[name] = known[name]
                continue
            try:
                manifest = json.loads(await self._store.get(key))
            except NotFound:
                continue
            found[name] = sum(int(each.get("size", 0)) for each in manifest.get("files", []))
        self._artifacts[project] = time.monotonic(), found
        return found


def sums(store: StateStore) -> Table[ProjectStorage]:
    """What ingest says of projects, in the bucket of the keys: all read that already, and only ingest writes it."""
    return Table(store, ProjectStorage, missing=ProjectNotFound)


def told(store: StateStore) -> Records:
    """The records for services other than ingest, as two sums.

    Args:
        store: the bucket services.core.auth.keyring.BUCKET.
    """
    table = sums(store)

    async def records(owner: str) -> Mapping[str, int]:
        found = await table.find(owner) or ProjectStorage()
        return {f"{owner}/uploads/all": found.uploads, f"{owner}/sources/all": found.sources}

    return records


def kind_of(name: str) -> str:
    """The field of StorageUsage in which a stored thing is counted."""
    match name.split("/")[2:]:
        case [("uploads" | "sources" | "snapshots") as kind, *_]:
            return kind
        case ["datasets" | "scans", *_]:
            return "datasets"
        case ["runs", _, "checkpoints", *_]:
            return "adapters"
        case _:
            return "training_states"


def size_of(files: Mapping[str, Path | bytes]) -> int:
    """Bytes that an artifact of these files takes."""
    return sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in files.values())


async def _retry(owner: str) -> float:
    return _LATER
