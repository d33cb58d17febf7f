"""A loaded run on its way: every event of the loop is told, committed and counted. The loop itself runs in threads."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

from codegraft.trainer.v1.run_pb2 import Run
from services.core.errors import JobCancelled
from services.core.jobs import JobContext
from services.core.runtime import Runtime
from services.trainer.commit import Committer
from services.trainer.eta import Estimate
from services.trainer.metrics import Metrics
from services.trainer.records import Tables
from services.trainer.resume import States
from services.trainer.retention import delete_surplus
from services.trainer.telling import Teller

if TYPE_CHECKING:
    from services.trainer.job import Loaded
    from services.trainer.loop import CheckpointDue


class Training:
    """The training of one attempt.

    Args:
        dataset_digest: of the dataset that it trains on.
        folder: for files on their way to the store.
    """

    def __init__(
        self,
        runtime: Runtime,
        tables: Tables,
        context: JobContext[Run],
        teller: Teller,
        states: States,
        loaded: Loaded,
        dataset_digest: str,
        folder: Path,
    ) -> None:
        self._store = runtime.store
        self._checkpoints = tables.checkpoints
        self._context = context
        self._teller = teller
        self._states = states
        self._loaded = loaded
        self._folder = folder
        self._metrics = Metrics(teller, loaded.settings, loaded.corpus.tokens)
        self._committer = Committer(
            teller, tables.checkpoints, runtime.artifacts, loaded, dataset_digest, folder / "adapters"
        )
        state = loaded.state
        self._estimate = Estimate(
            loaded.settings, evaluated_step=state.evaluated_step, evaluation_seconds=state.evaluation_seconds
        )

    async def run(self) -> None:
        """Trains to the end.

        Raises:
            JobCancelled: it should stop. What was trained is kept, unless the run is in other hands.
            TrainingDiverged: see the loop; the last good checkpoint stays.
        """
        from services.trainer import loop

        loaded = self._loaded
        loaded.state.proved = self._teller.run.HasField("proof")
        await self._progress("training" if loaded.state.step else "evaluating the base model")
        story = loop.train(
            loaded.trainee,
            loaded.optimizer,
            loaded.settings,
            loaded.corpus,
            loaded.held_out,
            loaded.state,
            self._context.is_cancelled,
            loaded.put_initial,
            loaded.exam,
        )
        try:
            while (event := await asyncio.to_thread(next, story, None)) is not None:
                match event:
                    case loop.StepDone():
                        self._estimate.step(event.seconds)
                        await self._progress("training")
                        await self._metrics.step(event)
                    case loop.Evaluated():
                        self._estimate.evaluation(event.step, event.seconds)
                        await self._metrics.evaluation(event)
                    case loop.CheckpointDue():
                        await self._commit(event)
                        if loaded.state.ended:
                            await self._progress("making the proof")
                    case loop.Proved(proof):
                        await self._metrics.proof(proof)
        except JobCancelled:
            if self._context.lost:
                raise
            if self._states.step < loaded.state.step:
                await self._commit(loop.CheckpointDue(loaded.state.step, None, False))
            if self._context.pausing:
                await self._teller.note(f"stopped after step {loaded.state.step} because a pause was asked for")
            raise

    async def _commit(self, due: CheckpointDue) -> None:
        """The checkpoint, then the state to go on from, then what is left over goes: in this order nothing is missing
        whenever the process ends."""
        began = time.monotonic()
        await self._metrics.flush()
        await self._committer.commit(due)
        await self._states.keep(self._loaded, self._folder / "state")
        deleted = await delete_surplus(
            self._checkpoints, self._store, self._teller.run.name, self._loaded.settings.keep_checkpoints
        )
        if deleted:
            steps = ", ".join(map(str, deleted))
            await self._teller.note(f"deleted the checkpoint of step {steps}: newer ones take its place")
        self._estimate.commit(due.step, time.monotonic() - began)

    async def _progress(self, message: str) -> None:
        state = self._loaded.state
        left = self._estimate.left(state.step, state.seconds, state.proof_seconds)
        total = self._loaded.settings.train_steps
        await self._context.progress(state.step, total, "steps", message, seconds_left=left)
