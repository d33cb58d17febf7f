"""A run on its way: what its training processes tell is told on, committed and counted.

The processes train on meanwhile: what is slow here (an upload, an outage of the store) holds them up only when several
checkpoints wait, see services/trainer/launch/folder.
"""

from __future__ import annotations

import asyncio
import time

from codegraft.trainer.v1.hyperparameters_pb2 import Plan
from codegraft.trainer.v1.run_event_pb2 import RunEvent
from codegraft.trainer.v1.run_pb2 import Run
from codegraft.trainer.v1.training_pb2 import (
    CheckpointWritten,
    SetEvaluated,
    TrainingEnded,
    TrainingLoaded,
    TrainingMessage,
)
from services.core.errors import InternalError, JobCancelled
from services.core.jobs import JobContext
from services.core.runtime import Runtime
from services.core.telemetry import tracing
from services.trainer import figures
from services.trainer.launch.folder import RunFolder
from services.trainer.launch.launcher import Processes
from services.trainer.planning.settings import Settings
from services.trainer.records import Tables
from services.trainer.run.commit import Committer
from services.trainer.run.eta import Estimate
from services.trainer.run.metrics import Metrics
from services.trainer.run.resume import States
from services.trainer.run.retention import delete_surplus
from services.trainer.run.telling import Teller


class Training:
    """The training of one attempt.

    Args:
        dataset_digest: of the dataset that it trains on.
        folder: shared with the processes.
    """

    def __init__(
        self,
        runtime: Runtime,
        tables: Tables,
        context: JobContext[Run],
        teller: Teller,
        states: States,
        dataset_digest: str,
        folder: RunFolder,
    ) -> None:
        self._runtime = runtime
        self._checkpoints = tables.checkpoints
        self._context = context
        self._teller = teller
        self._states = states
        self._dataset_digest = dataset_digest
        self._folder = folder
        self._step = 0
        self._seconds = 0.0
        self._proof_seconds = 0.0

    async def run(self, processes: Processes) -> TrainingEnded:
        """Follows the processes to their end, and sees to it that there is one.

        Raises:
            JobCancelled: it should stop. What was trained is kept, unless the run is in other hands.
            CodegraftError: why they cannot go on; the last good checkpoint stays.
        """
        stopping = asyncio.create_task(self._stop_when_asked(processes))
        try:
            async for message in processes.events():
                await self._on(message)
                if message.HasField("ended"):
                    return message.ended
            raise InternalError("training ended without a word")
        except JobCancelled:
            if self._context.pausing and not self._context.lost:
                await self._teller.note(f"stopped after step {self._step} because a pause was asked for")
            raise
        finally:
            stopping.cancel()
            await processes.fence()

    async def _stop_when_asked(self, processes: Processes) -> None:
        await self._context.cancelled.wait()
        processes.stop()

    async def _on(self, message: TrainingMessage) -> None:
        match message.WhichOneof("message"):
            case "loaded":
                await self._on_loaded(message.loaded)
            case "step":
                self._step, self._seconds = message.step.step, message.step.run_seconds
                self._estimate.step(message.step.seconds)
                await self._progress("training")
                await self._metrics.step(message.step)
            case "base_evaluation":
                await self._on_evaluation(message.base_evaluation, is_base=True)
            case "evaluation":
                await self._on_evaluation(message.evaluation, is_base=False)
            case "checkpoint":
                await self._commit(message.checkpoint)
                if message.checkpoint.last:
                    await self._progress("making the proof")
            case "proof":
                await self._metrics.proof(message.proof)

    async def _on_loaded(self, loaded: TrainingLoaded) -> None:
        """The processes have begun, or begun again after one of them was lost."""
        if not self._teller.run.HasField("plan"):
            await self._teller.tell(RunEvent(plan=loaded.plan), lambda record: record.plan.CopyFrom(loaded.plan))
            await self._teller.tell(RunEvent(data=loaded.data))
        elif note := less_memory(self._teller.run.plan, loaded.plan):
            await self._teller.note(note)
        if loaded.step:
            await self._teller.note(f"goes on after step {loaded.step}")
        self._step, self._seconds, self._proof_seconds = loaded.step, loaded.seconds, loaded.proof_seconds
        self._settings = settings = Settings.from_proto(loaded.plan.hyperparameters)
        self._metrics = Metrics(self._teller, settings, loaded.corpus_tokens)
        self._committer = Committer(
            self._teller,
            self._checkpoints,
            self._runtime.artifacts,
            self._runtime.storage,
            loaded,
            self._dataset_digest,
        )
        self._estimate = Estimate(
            settings, evaluated_step=loaded.evaluated_step, evaluation_seconds=loaded.evaluation_seconds
        )
        await self._progress("training" if loaded.step else "evaluating the base model")

    async def _on_evaluation(self, evaluated: SetEvaluated, *, is_base: bool) -> None:
        self._proof_seconds = evaluated.proof_seconds
        self._estimate.evaluation(evaluated.step, evaluated.metrics.seconds)
        await self._metrics.evaluation(evaluated, is_base=is_base)

    async def _commit(self, written: CheckpointWritten) -> None:
        """The checkpoint, then the state to go on from, then what is left over goes: in this order nothing is missing
        whenever the process ends."""
        if self._context.lost:
            return
        began = time.monotonic()
        await self._metrics.flush()
        with tracing.span("checkpoint", attributes={"codegraft.step": written.step}):
            await self._committer.commit(written)
            await self._states.keep(written)
        await asyncio.to_thread(self._folder.release, written)
        deleted = await delete_surplus(
            self._checkpoints, self._runtime.store, self._teller.run, self._settings.keep_checkpoints
        )
        if deleted:
            steps = ", ".join(map(str, deleted))
            await self._teller.note(f"deleted the checkpoint of step {steps}: newer ones take its place")
        self._estimate.commit(time.monotonic() - began)
        figures.COMMIT_SECONDS.observe(time.monotonic() - began)

    async def _progress(self, message: str) -> None:
        left = self._estimate.left(self._step, self._seconds, self._proof_seconds)
        await self._context.progress(self._step, self._settings.train_steps, "steps", message, seconds_left=left)


def less_memory(planned: Plan, fitted: Plan) -> str:
    """What to tell of an attempt that has less memory than its plan was made for; empty when it has as much.

    The plan stays as it is: a later attempt may have the memory again.
    """
    before, now = planned.hyperparameters, fitted.hyperparameters
    changes = []
    if now.micro_batch_size != before.micro_batch_size:
        rows = now.micro_batch_size
        changes.append(f"{rows} row{'s' * (rows > 1)} at once instead of {before.micro_batch_size}")
    if now.low_gpu_memory_mode and not before.low_gpu_memory_mode:
        changes.append("low memory mode")
    if not changes:
        return ""
    drawn = " and for what dropout draws" if now.lora_dropout else ""
    return (
        f"there is less memory than at the plan: trains with {' and '.join(changes)}. The batches stay the same, and "
        f"so does the result but for rounding{drawn}"
    )
