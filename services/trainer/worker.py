"""Works on runs: loads, trains step by step, and tells the story. Training runs in threads, everything else here."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.message import Message

from codegraft.common.v1.job_pb2 import JOB_STATE_RUNNING
from codegraft.event.v1.events_pb2 import BestCheckpointChanged, CheckpointCreated, RunMetric
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest, Checkpoint, TrainStateManifest
from codegraft.trainer.v1.run_event_pb2 import EvalMetrics, RunEvent, StepMetrics
from codegraft.trainer.v1.run_pb2 import Run
from services.core import log, names
from services.core.errors import CodegraftError, DigestMismatch, JobCancelled, NotFound, ResourceExists, Unavailable
from services.core.jobs import JobContext
from services.core.models import catalogue
from services.core.runtime import Runtime
from services.core.store.blobs import key
from services.trainer import datasets
from services.trainer.config import TrainerSettings
from services.trainer.datasets import Newest
from services.trainer.records import Tables

if TYPE_CHECKING:
    from services.trainer.job import Loaded
    from services.trainer.loop import CheckpointDue, Evaluated, StepDone

METRIC = "codegraft.trainer.run.metric.v1"
CREATED = "codegraft.trainer.checkpoint.created.v1"
BEST = "codegraft.trainer.checkpoint.best.v1"
_STEP_SECONDS = 1.0
"""Steps that come faster are told together."""

logger = log.get(__name__)


class RunWorker:
    """Handles the jobs of kind "run"."""

    def __init__(self, runtime: Runtime, settings: TrainerSettings, tables: Tables, newest: Newest) -> None:
        self._runtime = runtime
        self._settings = settings
        self._tables = tables
        self._newest = newest

    async def handle(self, context: JobContext[Run]) -> None:
        """One attempt at a run; goes on from the last kept state when there is one."""
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="codegraft-run-"))
        try:
            await _Attempt(self._runtime, self._settings, self._tables, context, folder).train(self._newest)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


class _Attempt:
    """One attempt at one run."""

    def __init__(
        self, runtime: Runtime, settings: TrainerSettings, tables: Tables, context: JobContext[Run], folder: Path
    ) -> None:
        self._runtime = runtime
        self._settings = settings
        self._tables = tables
        self._context = context
        self._folder = folder
        self._run = context.job
        self._kept_state = ""
        self._steps: list[StepDone] = []
        self._told = time.monotonic()
        self._trained_tokens = 0

    async def train(self, newest: Newest) -> None:
        context, run = self._context, self._run
        await self._tell(RunEvent(state=JOB_STATE_RUNNING))
        await context.progress(0, 0, "steps", "loading the model")
        manifest = await datasets.find(self._runtime.artifacts, newest, names.project_of(run.name), run.dataset)
        train, test = await datasets.fetch(self._runtime.artifacts, manifest)
        resume = await self._last_state()
        from services.trainer import job, loop  # imports torch: seconds in which calls are answered already

        loaded = await asyncio.to_thread(
            job.load,
            catalogue.find(run.base_model),
            self._settings,
            run.requested,
            train,
            test,
            planned=run.plan if run.HasField("plan") else None,
            resume=resume,
        )
        if not run.HasField("plan"):
            plan = loaded.plan
            await self._tell(RunEvent(plan=plan), lambda record: record.plan.CopyFrom(plan))
        if resume is not None:
            await self._tell(RunEvent(note=f"goes on after step {loaded.state.step}"))
        await context.progress(loaded.state.step, loaded.settings.train_steps, "steps", "evaluating the base model")
        story = loop.train(
            loaded.trainee,
            loaded.optimizer,
            loaded.settings,
            loaded.corpus,
            loaded.held_out,
            loaded.state,
            context.is_cancelled,
        )
        try:
            while (event := await asyncio.to_thread(next, story, None)) is not None:
                match event:
                    case loop.StepDone():
                        await self._on_step(loaded, event)
                    case loop.Evaluated():
                        await self._on_evaluation(loaded, event)
                    case loop.CheckpointDue():
                        await self._on_checkpoint(loaded, manifest.digest, event)
        except JobCancelled:
            if not context.lost and loaded.state.step and self._run_step() < loaded.state.step:
                await self._flush_steps(loaded)
                await self._on_checkpoint(loaded, manifest.digest, loop.CheckpointDue(loaded.state.step, None, False))
            raise
        if loaded.state.ended != "all steps done":
            await self._tell(RunEvent(note=f"ended early: {loaded.state.ended}"))
        if not self._run.best_checkpoint:
            await self._tell(RunEvent(note="no checkpoint is better than the base model, so none is published as best"))
        logger.info("run trained", run=run.name, steps=loaded.state.step, ended=loaded.state.ended)

    def _run_step(self) -> int:
        """Step of the newest kept state."""
        return int(self._kept_state.rsplit("/", 1)[1]) if self._kept_state else 0

    async def _on_step(self, loaded: Loaded, done: StepDone) -> None:
        self._steps.append(done)
        await self._context.progress(done.step, loaded.settings.train_steps, "steps", "training")
        if time.monotonic() - self._told >= _STEP_SECONDS or done.step == 1:
            await self._flush_steps(loaded)

    async def _flush_steps(self, loaded: Loaded) -> None:
        """Tells of the steps since the last time, together."""
        if not self._steps:
            return
        steps, self._steps, self._told = self._steps, [], time.monotonic()
        tokens = sum(step.tokens for step in steps)
        self._trained_tokens += tokens
        loss = sum(step.train_loss * step.tokens for step in steps) / tokens
        last = steps[-1]
        metrics = StepMetrics(
            step=last.step,
            train_loss=loss,
            learning_rate=last.learning_rate,
            grad_norm=last.grad_norm,
            tokens_per_second=tokens / max(1e-9, sum(step.seconds for step in steps)),
            tokens=last.step * loaded.settings.batch_size * loaded.settings.context_length,
            epoch=last.step * loaded.settings.batch_size * loaded.settings.context_length / loaded.corpus.tokens,
        )

        def change(record: Run) -> None:
            record.step, record.train_loss = last.step, loss

        await self._tell(RunEvent(step=metrics), change)
        await self._publish(METRIC, RunMetric(run=self._run.name, step=last.step, train_loss=loss), f"step-{last.step}")

    async def _on_evaluation(self, loaded: Loaded, found: Evaluated) -> None:
        await self._flush_steps(loaded)
        metrics = EvalMetrics(
            step=found.step,
            test_loss=found.test.loss,
            tokens=found.test.tokens,
            seconds=found.seconds,
            source_losses=found.test.by_source,
        )

        def change(record: Run) -> None:
            record.test_loss = found.test.loss
            if found.step == 0:
                record.base_test_loss = found.test.loss

        await self._tell(RunEvent(evaluation=metrics), change)
        metric = RunMetric(run=self._run.name, step=found.step, test_loss=found.test.loss)
        await self._publish(METRIC, metric, f"evaluation-{found.step}")

    async def _on_checkpoint(self, loaded: Loaded, dataset_digest: str, due: CheckpointDue) -> None:
        """Adapter, then its record, then the story, then the word to the others; last the state to go on from."""
        await self._flush_steps(loaded)
        run, settings = self._run, loaded.settings
        name = f"{run.name}/checkpoints/{due.step}"
        from services.trainer import checkpoint

        files, sha256 = await asyncio.to_thread(
            checkpoint.save_adapter, loaded.trainee, self._folder / f"adapter-{due.step}", run.base_model
        )
        train_loss = run.train_loss if run.HasField("train_loss") else None
        manifest = AdapterManifest(
            name=name,
            sha256=sha256,
            base_model=run.base_model,
            base_digest=loaded.base_digest,
            lora_r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            target_modules=loaded.trainee.target_modules,
            prompt_format=loaded.prompt_format,
            dataset=run.dataset,
            dataset_digest=dataset_digest,
            step=due.step,
            train_loss=train_loss,
            test_loss=due.test_loss,
            base_test_loss=loaded.state.base_loss,
            hyperparameters=settings.to_proto(),
        )
        # Another attempt may have been here before: with resume it made the same bytes.
        with contextlib.suppress(ResourceExists):
            await self._runtime.artifacts.commit(name, manifest, dict(files))
        stored = await self._runtime.artifacts.manifest(name, AdapterManifest)
        record = Checkpoint(
            name=name,
            step=due.step,
            sha256=stored.sha256,
            train_loss=train_loss,
            test_loss=due.test_loss,
            best=due.is_best,
            base_model=run.base_model,
            base_digest=loaded.base_digest,
            size=sum(file.size for file in stored.files),
        )
        record.create_time.GetCurrentTime()
        record = await self._record(record)
        await self._tell(RunEvent(checkpoint=record))
        created = CheckpointCreated(checkpoint=name, sha256=record.sha256, test_loss=due.test_loss)
        await self._publish(CREATED, created, f"checkpoint-{due.step}")
        if due.is_best and due.test_loss is not None:
            await self._on_best(record, loaded, due.test_loss)
        await self._keep_state(loaded, due.step)

    async def _record(self, record: Checkpoint) -> Checkpoint:
        """Stores the record of a checkpoint; where an earlier attempt did, only adds what was measured since."""
        try:
            return await self._tables.checkpoints.create(record)
        except ResourceExists:

            def change(there: Checkpoint) -> None:
                if record.HasField("test_loss"):
                    there.test_loss, there.best = record.test_loss, record.best

            return await self._tables.checkpoints.mutate(record.name, change)

    async def _on_best(self, record: Checkpoint, loaded: Loaded, test_loss: float) -> None:
        before = self._run.best_checkpoint

        def change(run: Run) -> None:
            run.best_checkpoint, run.best_test_loss = record.name, test_loss

        await self._tell(RunEvent(best=record), change)
        if before and before != record.name:

            def demote(old: Checkpoint) -> None:
                old.best = False

            await self._tables.checkpoints.mutate(before, demote)
        changed = BestCheckpointChanged(
            checkpoint=record.name,
            sha256=record.sha256,
            base_model=record.base_model,
            base_digest=record.base_digest,
            test_loss=test_loss,
            base_test_loss=loaded.state.base_loss or 0.0,
        )
        await self._publish(BEST, changed, f"best-{record.step}")

    async def _keep_state(self, loaded: Loaded, step: int) -> None:
        """Keeps what a later attempt needs, and drops the one before."""
        from services.trainer import checkpoint

        files = await asyncio.to_thread(
            checkpoint.save_state,
            loaded.trainee,
            loaded.optimizer,
            loaded.state,
            self._folder / f"state-{step}",
            owner=self._run.name,
        )
        name = f"{self._run.name}/states/{step}"
        before, self._kept_state = self._kept_state, name
        with contextlib.suppress(ResourceExists):
            await self._runtime.artifacts.commit(name, TrainStateManifest(name=name, step=step), dict(files))
        if before and before != name:
            await self._drop_state(before)

    async def _drop_state(self, name: str) -> None:
        with contextlib.suppress(CodegraftError):
            manifest = await self._runtime.artifacts.manifest(name, TrainStateManifest)
            await self._runtime.store.delete(f"{name}/manifest.json")
            for file in manifest.files:
                await self._runtime.store.delete(key(file.sha256))

    async def _last_state(self) -> Path | None:
        """Folder of the newest state that an earlier attempt kept."""
        steps = []
        prefix = f"{self._run.name}/states/"
        async for found in self._runtime.store.list(prefix):
            steps.append(int(found.removeprefix(prefix).split("/")[0]))
        if not steps or not self._run.HasField("plan"):
            return None
        name = f"{prefix}{max(steps)}"
        try:
            manifest = await self._runtime.artifacts.manifest(name, TrainStateManifest)
            folder = await self._runtime.artifacts.fetch(name, manifest.files)
        except (NotFound, DigestMismatch) as error:
            logger.warning("the kept state cannot be read, starting over", run=self._run.name, error=error.message)
            return None
        self._kept_state = name
        return folder

    async def _tell(self, event: RunEvent, change: Callable[[Run], None] | None = None) -> None:
        """Adds to the story, then counts it in the run's record, with what else changes there."""
        event.sequence = self._run.last_sequence + 1
        event.time.GetCurrentTime()
        await self._tables.story.write(self._run.name, event, self._context.epoch)

        def count(record: Run) -> None:
            record.last_sequence = event.sequence
            if change is not None:
                change(record)

        self._run = await self._context.update(count)

    async def _publish(self, event_type: str, payload: Message, what: str) -> None:
        """Events are a convenience for others: an outage of NATS does not stop a run."""
        try:
            await self._runtime.events.publish(event_type, self._run.name, payload, id=f"{self._run.name}/{what}")
        except Unavailable as error:
            logger.warning("an event could not be published", run=self._run.name, error=error.message)
