"""One attempt at one run: find its dataset and what earlier attempts left, have it trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from codegraft.common.v1.job_pb2 import JOB_STATE_RUNNING
from codegraft.scanner.v1.dataset_pb2 import DatasetManifest
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from codegraft.trainer.v1.run_event_pb2 import RunEvent
from codegraft.trainer.v1.run_pb2 import Run
from codegraft.trainer.v1.training_pb2 import TrainingSpec
from services.core import log, names
from services.core.errors import ArtifactNotFound, CheckpointNotFound
from services.core.jobs import JobContext
from services.core.models import catalogue, stored
from services.core.runtime import Runtime
from services.core.telemetry import tracing
from services.trainer import datasets
from services.trainer.config import TrainerSettings
from services.trainer.datasets import Newest
from services.trainer.launch.folder import RunFolder
from services.trainer.launch.launcher import Launcher
from services.trainer.records import Tables
from services.trainer.run.resume import States
from services.trainer.run.telling import Teller
from services.trainer.run.training import Training

logger = log.get(__name__)


class Attempt:
    """One attempt at one run.

    Args:
        folder: an empty one, for as long as the attempt lasts.
        devices: where to train, by name; see Launcher.start.
    """

    def __init__(
        self,
        runtime: Runtime,
        settings: TrainerSettings,
        tables: Tables,
        context: JobContext[Run],
        launcher: Launcher,
        folder: Path,
        devices: Sequence[str],
    ) -> None:
        self._runtime = runtime
        self._settings = settings
        self._tables = tables
        self._context = context
        self._launcher = launcher
        self._folder = RunFolder(folder)
        self._devices = devices
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
        with tracing.span("fetch dataset and model"):
            self._folder.prepare(await self._spec(manifest))
        training = Training(self._runtime, self._tables, context, teller, self._states, manifest.digest, self._folder)
        ended = await training.run(self._launcher.start(self._folder, self._devices))
        if ended.why != "all steps done":
            await teller.note(f"ended early: {ended.why}")
        if not teller.run.best_checkpoint:
            await teller.note(ended.nothing_best)
        logger.info("run trained", run=run.name, steps=ended.step, ended=ended.why)

    async def _spec(self, manifest: DatasetManifest) -> TrainingSpec:
        """What the training processes are to do, with everything that they need on this machine."""
        run = self._context.job
        train, test = await datasets.fetch(self._runtime.artifacts, manifest)
        spec = TrainingSpec(
            run=run.name,
            base_model=run.base_model,
            requested=run.requested,
            train_path=str(train),
            test_path=str(test),
            settings=self._settings.model_dump_json(),
            proved=run.HasField("proof"),
        )
        await stored.bring(catalogue.find(run.base_model), self._settings.cache_dir, self._runtime.artifacts)
        if run.HasField("plan"):
            spec.plan.CopyFrom(run.plan)
            # Without a plan no step was taken: another attempt's state would be of another run of this name.
            if (resume := await self._states.newest()) is not None:
                spec.resume_path = str(resume)
        if run.initial_checkpoint:
            initial = await self._initial(run.initial_checkpoint)
            spec.initial.CopyFrom(initial)
            spec.initial_path = str(await self._runtime.artifacts.fetch(initial.name, initial.files))
        return spec

    async def _initial(self, name: str) -> AdapterManifest:
        """Manifest of the adapter that the run starts from."""
        try:
            return await self._runtime.artifacts.manifest(name, AdapterManifest)
        except ArtifactNotFound:
            raise CheckpointNotFound(
                f"{name} does not exist any more", field="initial_checkpoint", hint="Start from another one."
            ) from None
