"""What the scanner keeps of a project: its scans, with their verdicts, and its datasets."""

from __future__ import annotations

import contextlib

from codegraft.scanner.v1.dataset_pb2 import Dataset
from codegraft.scanner.v1.scan_pb2 import Scan
from services.core.errors import NotFound
from services.core.leftovers import ended_jobs, remove, remove_orphans
from services.core.state import Table
from services.core.store import ObjectStore


class ScanLeftovers:
    """Lets go the scans and datasets of deleted projects (services/core/leftovers.py)."""

    def __init__(self, scans: Table[Scan], datasets: Table[Dataset], store: ObjectStore) -> None:
        self._scans, self._datasets, self._store = scans, datasets, store

    async def forget(self, project: str, before: float) -> bool:
        """See services.core.leftovers.Forget. Records go last: as long as they are there, the rest is found."""
        ended, all_of_them = await ended_jobs(self._scans, project, before)
        for dataset in await self._datasets.all(f"{project}/"):
            if dataset.create_time.ToNanoseconds() / 1e9 < before:
                await remove(self._store, f"{dataset.name}/")
                with contextlib.suppress(NotFound):  # another replica was faster, here and below
                    await self._datasets.delete(dataset.name)
        for scan in ended:
            await remove(self._store, f"{scan}/")
            with contextlib.suppress(NotFound):
                await self._scans.delete(scan)
        for table, kind in ((self._scans, "scans"), (self._datasets, "datasets")):
            left = await table.names(f"{project}/{kind}/")
            await remove_orphans(self._store, f"{project}/{kind}/", left, before)
        return all_of_them
