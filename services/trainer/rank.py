"""What each of the processes that train a run does: it reads from a folder what to do, and rank 0 tells what happens.

See services/trainer/launch/folder. Nothing here knows of NATS or of the store: the worker takes the checkpoints from
the folder.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from codegraft.trainer.v1.run_event_pb2 import DataMetrics, EvalMetrics
from codegraft.trainer.v1.training_pb2 import (
    CheckpointWritten,
    SetEvaluated,
    StepTrained,
    TrainingEnded,
    TrainingLoaded,
    TrainingMessage,
    TrainingSpec,
)
from services.core import disk, log
from services.core.errors import CodegraftError, InternalError, JobCancelled
from services.core.models import catalogue
from services.trainer import checkpoint, job, judging, loop
from services.trainer.config import TrainerSettings
from services.trainer.job import Initial, Loaded
from services.trainer.launch.folder import RunFolder
from services.trainer.ranks import ALONE, Ranks
from services.trainer.story import CheckpointDue, Evaluated, Proved, StepDone, Story

MOST_WAITING = 3
"""Checkpoints that may wait for the worker; training stands still before there are more, lest the disk fill up."""

logger = log.get(__name__)


def train(folder: RunFolder, ranks: Ranks = ALONE, device: str = "") -> None:
    """Trains what the folder asks for. Errors that have a reason are told there, others are raised.

    Args:
        device: where: "cpu", "cuda:1"; empty means as the settings say.
    """
    if folder.failure() is not None:  # an earlier start of this group found out that it cannot go on
        return
    try:
        _train(folder, ranks, device)
    except CodegraftError as error:
        # All ranks are cancelled together, but rank 0 has a checkpoint to write before the worker may hear of it.
        if ranks.rank == 0 or not isinstance(error, JobCancelled):
            folder.fail(error)
    except Exception as error:
        if (told := disk.full(error, folder.path)) is None and ranks.size > 1:
            raise  # perhaps the echo of another rank's end, after which the group starts again
        logger.exception("training failed")
        name = type(error).__name__
        folder.fail(told or InternalError(f"an unexpected error ended it ({name})", hint="See the log."))


def _train(folder: RunFolder, ranks: Ranks, device: str) -> None:
    spec, told = folder.spec(), folder.read()[0]
    loaded = _load(spec, told, ranks, device, folder.is_stopped)
    loaded.state.proved = spec.proved or any(message.HasField("proof") for message in told)
    rank_zero = _RankZero(folder, loaded, spec) if ranks.rank == 0 else None
    story = loop.train(
        loaded.trainee,
        loaded.optimizer,
        loaded.settings,
        loaded.corpus,
        loaded.held_out,
        loaded.state,
        folder.is_stopped,
        loaded.put_initial,
        loaded.exam,
        ranks,
    )
    if rank_zero is not None:
        rank_zero.tell(story)
    else:
        for _ in story:
            pass


def _load(
    spec: TrainingSpec, told: list[TrainingMessage], ranks: Ranks, device: str, is_cancelled: Callable[[], bool]
) -> Loaded:
    """Model, data and state: of the last checkpoint that was told, else of an earlier attempt, else none."""
    plans = [message.loaded.plan for message in told if message.HasField("loaded")]
    # The checkpoint before the first step has no state: a new start is as good.
    states = [message.checkpoint.state_path for message in told if message.checkpoint.state_path]
    resume = states[-1] if states else spec.resume_path
    settings = TrainerSettings.model_validate_json(spec.settings)
    return job.load(
        catalogue.find(spec.base_model),
        settings,
        spec.requested,
        Path(spec.train_path),
        Path(spec.test_path),
        device=device or settings.trainer_device,
        planned=plans[0] if plans else spec.plan if spec.HasField("plan") else None,
        resume=Path(resume) if resume else None,
        initial=Initial(spec.initial, Path(spec.initial_path)) if spec.HasField("initial") else None,
        is_cancelled=is_cancelled,
        ranks=ranks,
    )


class _RankZero:
    """What rank 0 does beside training: it tells of it, and keeps checkpoints."""

    def __init__(self, folder: RunFolder, loaded: Loaded, spec: TrainingSpec) -> None:
        self._folder = folder
        self._loaded = loaded
        self._spec = spec
        self._attempt = f"{spec.run} {secrets.token_hex(8)}"
        told = folder.open_messages()
        kept = [m.checkpoint.step for m in told if m.HasField("checkpoint")]
        # Of a run that took no step yet nothing is kept, not even step 0.
        self._kept_step = max([*kept, loaded.state.step or -1])
        message = TrainingLoaded(
            plan=loaded.plan,
            base_digest=loaded.base_digest,
            prompt_format=loaded.prompt_format,
            fim_sentinels=loaded.fim_sentinels,
            data=DataMetrics(**asdict(loaded.corpus.counts())),
            target_modules=loaded.trainee.target_modules,
            step=loaded.state.step,
            ranks=loaded.ranks.size,
            sharded=loaded.sharded,
            corpus_tokens=loaded.corpus.tokens,
            seconds=loaded.state.seconds,
            evaluated_step=loaded.state.evaluated_step,
            evaluation_seconds=loaded.state.evaluation_seconds,
            proof_seconds=loaded.state.proof_seconds,
        )
        folder.write(TrainingMessage(loaded=message))

    def tell(self, story: Story) -> None:
        """Goes through the story and tells it.

        Raises:
            JobCancelled: the worker asked to stop; a checkpoint of the last step is there. Before the first step it is
                the adapter that training would have begun with.
        """
        state = self._loaded.state
        try:
            for event in story:
                match event:
                    case StepDone():
                        self._folder.write(TrainingMessage(step=_step(event, state.seconds)))
                    case Evaluated():
                        self._folder.write(_evaluation(event, state.proof_seconds))
                    case CheckpointDue():
                        self._keep(event)
                    case Proved():
                        self._folder.write(TrainingMessage(proof=event.proof))
        except JobCancelled:
            if not state.step and self._loaded.put_initial is not None:
                self._loaded.put_initial()  # the base model may still have been evaluated, without any adapter
            if state.step > self._kept_step:
                self._keep(CheckpointDue(state.step, None, False))
            raise
        initial = self._spec.HasField("initial")
        rivals = "the base model and the adapter it started from" if initial else "the base model"
        nothing = "" if state.best_step else judging.nothing_best(state, rivals)
        ended = TrainingEnded(step=state.step, why=state.ended, nothing_best=nothing)
        self._folder.write(TrainingMessage(ended=ended))

    def _keep(self, due: CheckpointDue) -> None:
        while self._folder.waiting() >= MOST_WAITING and not self._folder.is_stopped():
            time.sleep(0.1)
        loaded = self._loaded
        adapter, state = self._folder.adapter_path(due.step), self._folder.state_path(due.step)
        weights = loaded.state.best_weights if due.is_best else None
        _, sha256 = checkpoint.save_adapter(loaded.trainee, adapter, self._spec.base_model, weights)
        # A forward pass over shards needs all ranks, and the others are not here.
        probe = None if loaded.sharded else checkpoint.probe_adapter(loaded.trainee, loaded.probe_ids, weights)
        if due.step:
            checkpoint.save_state(loaded.trainee, loaded.optimizer, loaded.state, state, owner=self._attempt)
        self._kept_step = due.step
        written = CheckpointWritten(
            step=due.step,
            test_loss=due.test_loss,
            best=due.is_best,
            adapter_path=str(adapter),
            sha256=sha256,
            state_path=str(state) if due.step else "",
            last=bool(loaded.state.ended),
            strength=loaded.state.best_strength if due.is_best else 1.0,
            probe=probe,
        )
        self._folder.write(TrainingMessage(checkpoint=written))


def _step(done: StepDone, run_seconds: float) -> StepTrained:
    return StepTrained(
        step=done.step,
        train_loss=done.train_loss,
        learning_rate=done.learning_rate,
        grad_norm=done.grad_norm,
        tokens=done.tokens,
        seconds=done.seconds,
        run_seconds=run_seconds,
    )


def _evaluation(found: Evaluated, proof_seconds: float) -> TrainingMessage:
    metrics = EvalMetrics(
        step=found.step,
        test_loss=found.test.loss,
        tokens=found.test.tokens,
        seconds=found.seconds,
        source_losses=found.test.by_source,
        foreign_loss=found.foreign_loss,
    )
    told = SetEvaluated(step=found.step, metrics=metrics, refused=found.refused, proof_seconds=proof_seconds)
    return TrainingMessage(base_evaluation=told) if found.is_base else TrainingMessage(evaluation=told)
