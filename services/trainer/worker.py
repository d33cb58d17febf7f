"""Takes runs from the queue, one at a time on its device, and gives each a folder for the time of an attempt."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

from codegraft.trainer.v1.run_pb2 import Run
from services.core.jobs import JobContext
from services.core.runtime import Runtime
from services.trainer.attempt import Attempt
from services.trainer.config import TrainerSettings
from services.trainer.datasets import Newest
from services.trainer.records import Tables


class RunWorker:
    """Handles the jobs of kind "run" on one device.

    Args:
        device: "cpu", "cuda:1", or "auto" for whatever there is.
    """

    def __init__(
        self, runtime: Runtime, settings: TrainerSettings, tables: Tables, newest: Newest, device: str = "auto"
    ) -> None:
        self._runtime = runtime
        self._settings = settings
        self._tables = tables
        self._newest = newest
        self._device = device

    async def handle(self, context: JobContext[Run]) -> None:
        """One attempt at a run; goes on from the last kept state when there is one."""
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="codegraft-run-"))
        try:
            attempt = Attempt(self._runtime, self._settings, self._tables, context, folder, self._device)
            await attempt.train(self._newest)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
