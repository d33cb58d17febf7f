"""The state that a run keeps in the store so that another worker can go on with it: one at a time, the newest."""

from __future__ import annotations

import contextlib
from pathlib import Path

from codegraft.trainer.v1.checkpoint_pb2 import TrainStateManifest
from codegraft.trainer.v1.training_pb2 import CheckpointWritten
from services.core import log, names
from services.core.errors import CodegraftError, DigestMismatch, NotFound, ResourceExists
from services.core.quota.storage import size_of
from services.core.runtime import Runtime
from services.core.store.blobs import key
from services.trainer.launch.folder import files_in

logger = log.get(__name__)


class States:
    """The states of one run."""

    def __init__(self, runtime: Runtime, run: str) -> None:
        self._store = runtime.store
        self._artifacts = runtime.artifacts
        self._storage = runtime.storage
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

        Raises:
            QuotaExceeded: the project has no room for what it has more than the one before; that one stays.
        """
        if not written.state_path:
            return
        name = f"{self._prefix}{written.step}"
        files = files_in(Path(written.state_path))
        # All of them: an attempt that ended just before dropping one left one more.
        before = [f"{self._prefix}{step}" for step in await self._kept() if step < written.step]
        more = size_of(files) - sum([await self._size(each) for each in before])
        async with self._storage.claim([names.project_of(name)], name, max(0, more)):
            with contextlib.suppress(ResourceExists):
                await self._artifacts.commit(name, TrainStateManifest(name=name, step=written.step), files)
            for each in before:
                await self._drop(each)

    async def _kept(self) -> set[int]:
        return {int(found.removeprefix(self._prefix).split("/")[0]) async for found in self._store.list(self._prefix)}

    async def _size(self, name: str) -> int:
        try:
            return sum(file.size for file in (await self._artifacts.manifest(name, TrainStateManifest)).files)
        except (NotFound, DigestMismatch):
            return 0

    async def _drop(self, name: str) -> None:
        with contextlib.suppress(CodegraftError):
            manifest = await self._artifacts.manifest(name, TrainStateManifest)
            await self._store.delete(f"{name}/manifest.json")
            for file in manifest.files:
                await self._store.delete(key(file.sha256))
