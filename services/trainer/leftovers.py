"""What the trainer keeps of a project: its runs, with their checkpoints, their stories and their artifacts."""

from __future__ import annotations

import contextlib

from services.core.errors import NotFound
from services.core.leftovers import ended_jobs, remove, remove_orphans
from services.core.store import ObjectStore
from services.trainer.records import Tables


class RunLeftovers:
    """Lets go the runs of deleted projects (services/core/leftovers.py)."""

    def __init__(self, tables: Tables, store: ObjectStore) -> None:
        self._tables, self._store = tables, store

    async def forget(self, project: str, before: float) -> bool:
        """See services.core.leftovers.Forget. The run's record goes last: as long as it is there, the rest is found."""
        ended, all_of_them = await ended_jobs(self._tables.runs, project, before)
        for run in ended:
            await remove(self._store, f"{run}/")
            await self._tables.story.forget(run)
            for checkpoint in await self._tables.checkpoints.names(f"{run}/"):
                with contextlib.suppress(NotFound):  # another replica was faster, here and below
                    await self._tables.checkpoints.delete(checkpoint)
            with contextlib.suppress(NotFound):
                await self._tables.runs.delete(run)
        left = await self._tables.runs.names(f"{project}/")
        await remove_orphans(self._store, f"{project}/runs/", left, before)
        return all_of_them
