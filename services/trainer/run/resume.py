"""The state that a run keeps in the store so that another worker can go on with it: one at a time, the newest."""

from __future__ import annotations

import contextlib
from pathlib import Path

from codegraft.trainer.v1.checkpoint_pb2 import TrainStateManifest
from codegraft.trainer.v1.training_pb2 import CheckpointWritten
from services.core import log
from services.core.errors import CodegraftError, DigestMismatch, NotFound, ResourceExists
from services.core.runtime import Runtime
from services.core.store.blobs import key
from services.trainer.launch.folder import files_in

logger = log.get(__name__)


class States:
    """The states of one run.

    Attributes:
        step: step of the newest one; 0 while there is none.
    """

    def __init__(self, runtime: Runtime, run: str) -> None:
        self._store = runtime.store
        self._artifacts = runtime.artifacts
        self._run = run
        self._prefix = f"{run}/states/"
        self.step = 0

    async def newest(self) -> Path | None:
        """Folder of the newest state that an earlier attempt kept; None when there is none, or it is damaged."""
        steps = [int(found.removeprefix(self._prefix).split("/")[0]) async for found in self._store.list(self._prefix)]
        if not steps:
            return None
        name = f"{self._prefix}{max(steps)}"
        try:
            manifest = await self._artifacts.manifest(name, TrainStateManifest)
            folder = await self._artifacts.fetch(name, manifest.files)
        except (NotFound, DigestMismatch) as error:
            logger.warning("the kept state cannot be read, starting over", run=self._run, error=error.message)
            return None
        self.step = max(steps)
        return folder

    async def keep(self, written: CheckpointWritten) -> None:
        """Keeps what a later attempt needs to go on from this checkpoint, then drops the state before.

        Before the first step there is nothing to keep: a later attempt starts over, and comes to the same.
        """
        if not written.state_path:
            return
        step, before = written.step, self.step
        name = f"{self._prefix}{step}"
        with contextlib.suppress(ResourceExists):
            await self._artifacts.commit(
                name, TrainStateManifest(name=name, step=step), files_in(Path(written.state_path))
            )
        self.step = step
        if before and before != step:
            await self._drop(f"{self._prefix}{before}")

    async def _drop(self, name: str) -> None:
        with contextlib.suppress(CodegraftError):
            manifest = await self._artifacts.manifest(name, TrainStateManifest)
            await self._store.delete(f"{name}/manifest.json")
            for file in manifest.files:
                await self._store.delete(key(file.sha256))
