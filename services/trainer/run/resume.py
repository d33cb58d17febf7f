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
    """The states of one run."""

    def __init__(self, runtime: Runtime, run: str) -> None:
        self._store = runtime.store
        self._artifacts = runtime.artifacts
        self._run = run
        self._prefix = f"{run}/states/"

    async def newest(self) -> Path | None:
        """Folder of the newest state that an earlier attempt kept; None when there is none, or it is damaged."""
        steps = await self._kept()
        if not steps:
            return None
        name = f"{self._prefix}{max(steps)}"
        try:
            manifest = await self._artifacts.manifest(name, TrainStateManifest)
            return await self._artifacts.fetch(name, manifest.files)
        except (NotFound, DigestMismatch) as error:
            logger.warning("the kept state cannot be read, starting over", run=self._run, error=error.message)
            return None

    async def keep(self, written: CheckpointWritten) -> None:
        """Keeps what a later attempt needs to go on from this checkpoint, then drops the states before.

        Before the first step there is nothing to keep: a later attempt starts over, and comes to the same.
        """
        if not written.state_path:
            return
        name = f"{self._prefix}{written.step}"
        with contextlib.suppress(ResourceExists):
            await self._artifacts.commit(
                name, TrainStateManifest(name=name, step=written.step), files_in(Path(written.state_path))
            )
        # All of them: an attempt that ended just here left one more.
        for step in await self._kept():
            if step < written.step:
                await self._drop(f"{self._prefix}{step}")

    async def _kept(self) -> set[int]:
        return {int(found.removeprefix(self._prefix).split("/")[0]) async for found in self._store.list(self._prefix)}

    async def _drop(self, name: str) -> None:
        with contextlib.suppress(CodegraftError):
            manifest = await self._artifacts.manifest(name, TrainStateManifest)
            await self._store.delete(f"{name}/manifest.json")
            for file in manifest.files:
                await self._store.delete(key(file.sha256))
