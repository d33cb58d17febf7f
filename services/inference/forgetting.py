"""Lets texts of completions go that no project wants any more.

Events of ingest tell that keeping was turned off or that a project is gone. All projects of which there are texts are
looked through beside that, at the start and every so often: a lost event only delays.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta

from services.core import log
from services.core.backoff import Backoff
from services.core.errors import CodegraftError, DeadlineExceeded, Unavailable
from services.core.events import EventBus
from services.inference.kept import Kept

CHANGED = "codegraft.ingest.project.changed.v1"
_EVERY = 3600.0
"""Seconds between two looks at all projects: the names of all texts are read for it."""
_RETRIES = Backoff(first=timedelta(seconds=1), longest=timedelta(seconds=60))
_log = log.get("inference.forgetting")


class Forgetting:
    """See the module."""

    def __init__(self, kept: Kept, events: EventBus) -> None:
        self._kept, self._events = kept, events

    async def run(self) -> None:
        """Follows events and looks around until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            group.create_task(self._look_around())

    async def _follow(self) -> None:
        async for event in self._events.subscribe(CHANGED):
            await self._settle(event.subject)

    async def _look_around(self) -> None:
        while True:
            try:
                projects = await self._kept.projects()
            except Unavailable as error:
                _log.warning("texts of completions were not looked through", error=error.message)
                projects = set()
            for project in projects:
                await self._settle(project)
            await asyncio.sleep(_EVERY)

    async def _settle(self, project: str) -> None:
        """Tries until it is done: ingest, which has just told of the change, may be restarted."""
        failures = 0
        while True:
            try:
                if deleted := await self._kept.settle(project):
                    _log.info("texts of completions were deleted", project=project, completions=deleted)
                return
            except (Unavailable, DeadlineExceeded) as error:
                _log.warning("texts of completions may have to go", project=project, error=error.message)
                await asyncio.sleep(_RETRIES.delay(failures))
                failures += 1
            except CodegraftError as error:  # no name of a project, or this replica may not ask
                _log.error("texts of completions may have to go", project=project, error=error.message)
                return
