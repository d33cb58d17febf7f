"""One attempt at one run: find its dataset and what earlier attempts left, load, train."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from codegraft.common.v1.job_pb2 import JOB_STATE_RUNNING
from codegraft.scanner.v1.dataset_pb2 import DatasetManifest
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from codegraft.trainer.v1.run_event_pb2 import RunEvent
from codegraft.trainer.v1.run_pb2 import Run
from services.core import log, names
from services.core.errors import ArtifactNotFound, CheckpointNotFound
from services.core.jobs import JobContext
from services.core.models import catalogue, stored
from services.core.runtime import Runtime
from services.trainer import datasets
from services.trainer.config import TrainerSettings
from services.trainer.datasets import Newest
from services.trainer.records import Tables
from services.trainer.resume import States
from services.trainer.telling import Teller
from services.trainer.training import Training

if TYPE_CHECKING:
    from services.trainer.job import Initial, Loaded

logger = log.get(__name__)


class Attempt:
    """One attempt at one run.

    Args:
        folder: an empty one, for as long as the attempt lasts.
        device: where to train: "cpu", "cuda:1", "auto".
    """

    def __init__(
        self,
        runtime: Runtime,
        settings: TrainerSettings,
        tables: Tables,
        context: JobContext[Run],
        folder: Path,
        device: str,
    ) -> None:
        self._runtime = runtime
        self._settings = settings
        self._tables = tables
        self._context = context
        self._folder = folder
        self._device = device
        self._teller = Teller(tables.story, runtime.events, context)
        self._states = States(runtime, context.job.name)

    async def train(self, newest: Newest) -> None:
        """Trains to the end.

        Raises:
            JobCancelled: it should stop; what was trained is kept.
            CodegraftError: whatever is wrong with the run, its dataset or its model.
        """
        context, run, teller = self._context, self._context.job, self._teller
        await teller.tell(RunEvent(state=JOB_STATE_RUNNING))
        await context.progress(0, 0, "steps", "loading the model")
        manifest = await datasets.find(self._runtime.artifacts, newest, names.project_of(run.name), run.dataset)
        loaded = await self._load(manifest)
        if not run.HasField("plan"):
            await teller.tell(RunEvent(plan=loaded.plan), lambda record: record.plan.CopyFrom(loaded.plan))
        if loaded.state.step:
            await teller.note(f"goes on after step {loaded.state.step}")
        training = Training(
            self._runtime, self._tables, context, teller, self._states, loaded, manifest.digest, self._folder
        )
        await training.run()
        if loaded.state.ended != "all steps done":
            await teller.note(f"ended early: {loaded.state.ended}")
        if not teller.run.best_checkpoint:
            from services.trainer.loop import nothing_best

            rivals = "the base model and the adapter it started from" if run.initial_checkpoint else "the base model"
            await teller.note(nothing_best(loaded.state, rivals))
        logger.info("run trained", run=run.name, steps=loaded.state.step, ended=loaded.state.ended)

    async def _load(self, manifest: DatasetManifest) -> Loaded:
        run = self._context.job
        planned = run.plan if run.HasField("plan") else None
        train, test = await datasets.fetch(self._runtime.artifacts, manifest)
        # Without a plan no step was taken: another attempt's state would be of another run of this name.
        resume = await self._states.newest() if planned is not None else None
        initial = await self._initial()
        spec = catalogue.find(run.base_model)
        await stored.bring(spec, self._settings.cache_dir, self._runtime.artifacts)
        from services.trainer import job  # imports torch: seconds in which calls are answered already

        return await asyncio.to_thread(
            job.load,
            spec,
            self._settings,
            run.requested,
            train,
            test,
            device=self._device,
            planned=planned,
            resume=resume,
            initial=initial,
            is_cancelled=self._context.is_cancelled,
        )

    async def _initial(self) -> Initial | None:
        """The adapter that the run starts from."""
        name = self._context.job.initial_checkpoint
        if not name:
            return None
        from services.trainer.job import Initial

        try:
            manifest = await self._runtime.artifacts.manifest(name, AdapterManifest)
        except ArtifactNotFound:
            raise CheckpointNotFound(
                f"{name} does not exist any more", field="initial_checkpoint", hint="Start from another one."
            ) from None
        return Initial(manifest, await self._runtime.artifacts.fetch(name, manifest.files))
