"""Takes runs from the queue, one at a time on its devices, and gives each a folder for the time of an attempt."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from codegraft.trainer.v1.run_pb2 import Run
from services.core.jobs import JobContext
from services.core.runtime import Runtime
from services.trainer.config import TrainerSettings
from services.trainer.datasets import Newest
from services.trainer.launch.launcher import Launcher
from services.trainer.records import Tables
from services.trainer.run.attempt import Attempt


class RunWorker:
    """Handles the jobs of kind "run", one at a time.

    Args:
        launcher: starts the processes that train.
        devices: where, by name, one for each process; empty leaves it to the settings.
    """

    def __init__(
        self,
        runtime: Runtime,
        settings: TrainerSettings,
        tables: Tables,
        newest: Newest,
        launcher: Launcher,
        devices: Sequence[str] = (),
    ) -> None:
        self._runtime = runtime
        self._settings = settings
        self._tables = tables
        self._newest = newest
        self._launcher = launcher
        self._devices = devices

    async def handle(self, context: JobContext[Run]) -> None:
        """One attempt at a run; goes on from the last kept state when there is one."""
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="codegraft-run-"))
        try:
            attempt = Attempt(
                self._runtime, self._settings, self._tables, context, self._launcher, folder, self._devices
            )
            await attempt.train(self._newest)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
