"""How much projects and keys have stored, counted in one way for whoever is about to store: ingest, scanner, trainer.

Uploads and sources are ingest's records. It counts them itself, and for the others keeps their sum beside the quotas
(services/ingest/storage.py). All else are artifacts, which say in their manifests how large they are.

Room is claimed in one record of a project, which holds that sum as well (services/core/quota/places.py), so of two
services at the very same moment only one gets the last of it: what is read there, sum and claims, is of one moment, and
artifacts are counted after it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from pathlib import Path

from codegraft.access.v1.quota_pb2 import StorageUsage, StoredPlaces
from services.core.errors import NotFound
from services.core.quota.limits import Kind
from services.core.quota.places import Places, Settle
from services.core.quota.quotas import Quotas
from services.core.state import StateStore
from services.core.store import ObjectStore

Records = Callable[[str, StoredPlaces], Awaitable[Mapping[str, int]]]
"""Of an owner and its record of room: names of uploads and sources, and their bytes."""
CLAIM = timedelta(minutes=2)
"""What is on its way keeps its room for so long, if its process dies or is stopped."""
_LATER = 3600.0
"""Seconds after which to look again. Nobody knows when something is deleted."""


class Stored:
    """Counts what is stored, by resource name. What snapshots alone still hold is not counted.

    Args:
        fresh: seconds for which a project's artifacts are not looked for again, unless room was claimed for one.
    """

    def __init__(self, store: ObjectStore, records: Records, fresh: float = 0.0) -> None:
        self._store, self._records, self._fresh = store, records, fresh
        self._artifacts: dict[str, tuple[float, int, dict[str, int]]] = {}
        """By project: when they were counted, how many claims of them had ended then, and what was found, by name."""

    async def used(self, owner: str, there: StoredPlaces) -> Mapping[str, int]:
        """Bytes of a project's uploads, sources and artifacts; of anybody else those of what it made itself."""
        found = await self._artifacts_of(owner, there.artifacts) if owner.startswith("projects/") else {}
        return found | dict(await self._records(owner, there))

    async def usage(self, owner: str) -> StorageUsage:
        """The same, by what it is; as ingest tells it, which has the records."""
        found = StorageUsage()
        for name, size in (await self.used(owner, StoredPlaces())).items():
            kind = kind_of(name)
            setattr(found, kind, getattr(found, kind) + size)
        return found

    def places(self, quotas: Quotas, state: StateStore, settle: Settle, lasts: timedelta = CLAIM) -> Places:
        """Room for what is about to be stored.

        Args:
            state: the bucket services.core.auth.keyring.BUCKET, of which every service may write this record.
        """
        return Places(quotas, Kind.STORAGE, state, self.used, lasts=lasts, retry=_retry, settle=settle)

    async def _artifacts_of(self, project: str, ended: int) -> dict[str, int]:
        """Bytes of snapshots' listings, datasets, adapters and training states: what their manifests say."""
        began = time.monotonic()
        counted, known_ended, known = self._artifacts.get(project, (-self._fresh, 0, {}))
        if began - counted < self._fresh and ended <= known_ended:
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
        self._artifacts[project] = began, ended, found
        return found


async def told(owner: str, there: StoredPlaces) -> Mapping[str, int]:
    """The records for services other than ingest, as two sums: what that wrote beside the claims."""
    return {f"{owner}/uploads/all": there.recorded.uploads, f"{owner}/sources/all": there.recorded.sources}


async def artifact_ended(owner: str, after: StoredPlaces) -> None:
    """Says, as a claim of an artifact ends, that counts of artifacts are old."""
    after.artifacts += 1


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
