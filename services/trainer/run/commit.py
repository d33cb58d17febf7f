"""How a checkpoint comes to be: adapter, then its record, then the story, then the word to the others.

An attempt may end after any of these, and the next one does the same again from the state before: with resume it makes
the same bytes, so that whatever is there already is what it would have written.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from codegraft.event.v1.events_pb2 import BestCheckpointChanged, CheckpointCreated
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest, Checkpoint
from codegraft.trainer.v1.run_event_pb2 import RunEvent
from codegraft.trainer.v1.run_pb2 import Run
from codegraft.trainer.v1.training_pb2 import CheckpointWritten, TrainingLoaded
from services.core import names
from services.core.errors import ResourceExists
from services.core.quota.places import Places
from services.core.quota.storage import size_of
from services.core.state import Table
from services.core.store import Artifacts
from services.trainer import figures
from services.trainer.launch.folder import files_in
from services.trainer.run.telling import Teller

CREATED = "codegraft.trainer.checkpoint.created.v1"
BEST = "codegraft.trainer.checkpoint.best.v1"


class Committer:
    """Commits the checkpoints of one attempt.

    Args:
        storage: room in the project.
        dataset_digest: of the dataset that the run trains on.
    """

    def __init__(
        self,
        teller: Teller,
        checkpoints: Table[Checkpoint],
        artifacts: Artifacts,
        storage: Places,
        loaded: TrainingLoaded,
        dataset_digest: str,
    ) -> None:
        self._teller = teller
        self._checkpoints = checkpoints
        self._artifacts = artifacts
        self._storage = storage
        self._loaded = loaded
        self._dataset_digest = dataset_digest

    async def commit(self, written: CheckpointWritten) -> None:
        """Commits an adapter that is written, and tells about it.

        Raises:
            QuotaExceeded: the project has no room for it; the checkpoints before stay as they are.
        """
        loaded, teller, run = self._loaded, self._teller, self._teller.run
        train_loss = run.train_loss if run.HasField("train_loss") else None
        test_loss = written.test_loss if written.HasField("test_loss") else None
        stored = await self._commit_adapter(written, train_loss, test_loss)
        record = Checkpoint(
            name=stored.name,
            step=written.step,
            sha256=stored.sha256,
            train_loss=train_loss,
            test_loss=test_loss,
            best=written.best,
            base_model=run.base_model,
            base_digest=loaded.base_digest,
            size=sum(file.size for file in stored.files),
            strength=written.strength,
        )
        record.create_time.GetCurrentTime()
        record = await self._record(record)
        await teller.tell(RunEvent(checkpoint=record))
        created = CheckpointCreated(checkpoint=record.name, sha256=record.sha256, test_loss=test_loss)
        await teller.publish(CREATED, created, f"checkpoint-{written.step}")
        if written.best and test_loss is not None:
            await self._make_best(record, test_loss)

    async def _commit_adapter(
        self, written: CheckpointWritten, train_loss: float | None, test_loss: float | None
    ) -> AdapterManifest:
        """The manifest as it is stored, which may be an earlier attempt's."""
        loaded, run = self._loaded, self._teller.run
        settings = loaded.plan.hyperparameters
        name = f"{run.name}/checkpoints/{written.step}"
        manifest = AdapterManifest(
            name=name,
            sha256=written.sha256,
            base_model=run.base_model,
            base_digest=loaded.base_digest,
            lora_r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            target_modules=loaded.target_modules,
            prompt_format=loaded.prompt_format,
            fim_sentinels=loaded.fim_sentinels,
            dataset=run.dataset,
            dataset_digest=self._dataset_digest,
            step=written.step,
            train_loss=train_loss,
            test_loss=test_loss,
            base_test_loss=run.base_test_loss if run.HasField("base_test_loss") else None,
            hyperparameters=settings,
            strength=written.strength,
            probe=written.probe if written.HasField("probe") else None,
            best=written.best,
        )
        files = files_in(Path(written.adapter_path))
        async with self._storage.claim([names.project_of(name)], name, size_of(files)):
            with contextlib.suppress(ResourceExists):
                await self._artifacts.commit(name, manifest, files)
        return await self._artifacts.manifest(name, AdapterManifest)

    async def _record(self, record: Checkpoint) -> Checkpoint:
        """Stores the record of a checkpoint; where an earlier attempt did, only adds what was measured since.

        The run's best one stays that, also when this attempt measures a little more: it is what others follow.
        """
        try:
            return await self._checkpoints.create(record)
        except ResourceExists:

            def change(there: Checkpoint) -> None:
                if record.HasField("test_loss"):
                    there.test_loss = record.test_loss
                    there.best = record.best or record.name == self._teller.run.best_checkpoint

            return await self._checkpoints.mutate(record.name, change)

    async def _make_best(self, record: Checkpoint, test_loss: float) -> None:
        def change(run: Run) -> None:
            if run.best_checkpoint != record.name:
                run.previous_best_checkpoint = run.best_checkpoint
            run.best_checkpoint, run.best_test_loss = record.name, test_loss

        await self._teller.tell(RunEvent(best=record), change)
        # All others are looked at: an attempt that ended just here may have left more than one with the mark.
        for other in await self._checkpoints.all(f"{self._teller.run.name}/"):
            if other.best and other.name != record.name:
                await self._checkpoints.mutate(other.name, _demote)
        changed = BestCheckpointChanged(
            checkpoint=record.name,
            sha256=record.sha256,
            base_model=record.base_model,
            base_digest=record.base_digest,
            test_loss=test_loss,
            base_test_loss=self._teller.run.base_test_loss,
        )
        await self._teller.publish(BEST, changed, f"best-{record.step}")
        figures.BESTS.inc()


def _demote(checkpoint: Checkpoint) -> None:
    checkpoint.best = False
