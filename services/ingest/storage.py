"""How much projects and keys have stored: uploads, the files of sources, and what became of them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import timedelta

from services.core.auth.caller import ANYBODY
from services.core.errors import NotFound
from services.core.quota.limits import Kind
from services.core.quota.places import Places
from services.core.runtime import Runtime
from services.ingest.records import BUCKET, Tables

_FRESH = 30.0
"""Seconds for which a project's artifacts are not counted again: they grow by no call that is refused here."""
_LATER = 3600.0
"""Seconds after which to look again. Nobody knows when something is deleted."""
_UPLOAD = timedelta(hours=1)
"""What an upload keeps for itself, if its process dies."""


class Storage:
    """Counts what is stored, by resource name. What snapshots alone still hold is not counted."""

    def __init__(self, runtime: Runtime, tables: Tables) -> None:
        self._store, self._tables = runtime.store, tables
        self._artifacts: dict[str, tuple[float, dict[str, int]]] = {}
        """By project: when they were counted, and what was found, by name."""
        self.places = Places(
            runtime.quotas, Kind.STORAGE, runtime.state(BUCKET), self.used, lasts=_UPLOAD, retry=_retry
        )

    async def used(self, owner: str) -> Mapping[str, int]:
        """Bytes of a project's uploads, sources and artifacts; of anybody else those of what it made itself."""
        of_project = owner.startswith("projects/")
        prefix = f"{owner}/" if of_project else ""
        uploads = [each for each in await self._tables.uploads.all(prefix) if of_project or each.creator == owner]
        sources = [each for each in await self._tables.sources.all(prefix) if of_project or each.creator == owner]
        found = await self._artifacts_of(owner) if of_project else {}
        return found | {each.name: each.size for each in uploads} | {each.name: each.byte_count for each in sources}

    async def _artifacts_of(self, project: str) -> dict[str, int]:
        """Bytes of snapshots' listings, datasets, adapters and training states: what their manifests say."""
        counted, known = self._artifacts.get(project, (-_FRESH, {}))
        if time.monotonic() - counted < _FRESH:
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


def owners_of(project: str, creator: str) -> list[str]:
    """Whose quotas a thing has to fit that is stored when nobody calls any more."""
    return [project, creator] if creator not in ("", ANYBODY.subject) else [project]


async def _retry(owner: str) -> float:
    return _LATER
