"""The training loop. It yields what happens and stops between two steps, so that whoever runs it decides the rest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from services.core.errors import JobCancelled, TrainingDiverged
from services.trainer.data import IGNORED, Corpus
from services.trainer.evaluate import HeldOut, HeldOutLoss
from services.trainer.lora import Trainee
from services.trainer.settings import Settings


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimizer step was taken."""

    step: int
    """From 1."""
    train_loss: float
    """Nats per token of its batch."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Tokens of its batch."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The test set was evaluated."""

    step: int
    """0 is before the first step."""
    test: HeldOutLoss
    seconds: float
    is_base: bool = False
    """Whether it is the base model's, without any adapter."""


@dataclass(frozen=True, slots=True)
class CheckpointDue:
    """The adapter as it is now should be kept."""

    step: int
    test_loss: float | None
    """None between evaluations."""
    is_best: bool
    """Lowest test loss so far, below the base model's."""


Event = StepDone | Evaluated | CheckpointDue


@dataclass(slots=True)
class State:
    """Where a run is; with the masters and the optimizer all that a later process needs to go on exactly."""

    step: int = 0
    seconds: float = 0.0
    """Time spent, earlier processes included as far as their kept states tell: what came after the last one is not
    counted, and a limit gives it again."""
    base_loss: float | None = None
    best_loss: float | None = None
    """Lowest test loss, the base model's included."""
    best_step: int = 0
    evaluations_without_gain: int = 0
    evaluated_step: int = -1
    """Step of the newest evaluation."""
    ended: str = ""
    """Why the run is over."""
    step_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    commit_seconds: float = 0.0
    """What the newest step, evaluation and checkpoint took: a time limit leaves room for them."""
    _since: float = field(default_factory=time.monotonic)

    def tick(self) -> float:
        """Adds the time since the last tick; returns the time spent in all."""
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        return self.seconds


def make_optimizer(trainee: Trainee, settings: Settings) -> torch.optim.AdamW:
    """AdamW over the adapter's masters."""
    return torch.optim.AdamW(
        list(trainee.masters.values()), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )


def train(
    trainee: Trainee,
    optimizer: torch.optim.AdamW,
    settings: Settings,
    corpus: Corpus,
    test: HeldOut,
    state: State,
    is_cancelled: Callable[[], bool],
    initial: Callable[[], None] | None = None,
) -> Iterator[Event]:
    """Trains from ``state`` to the end of the settings, the time limit or the patience.

    Args:
        initial: puts the weights of an earlier adapter on the trainee; None for a run that starts afresh. A best
            checkpoint then beats that adapter as well as the base model.

    Raises:
        JobCancelled: it was asked for; the model stands after the last whole step.
        TrainingDiverged: a loss or a gradient is no finite number; the model stands after the last good step.
    """
    state.tick()
    if state.step == 0 and state.base_loss is None:
        # A fresh adapter is zero, so that this is the base model's loss.
        yield _evaluate(trainee, settings, test, state, is_cancelled)
        if initial is not None:
            initial()
            yield _evaluate(trainee, settings, test, state, is_cancelled)
            state.evaluations_without_gain = 0
    if state.step and not state.ended and state.evaluated_step != state.step:
        # An earlier process may have been stopped in the middle of this evaluation.
        yield from _after_step(trainee, settings, test, state, is_cancelled, is_new=False)
    while not state.ended:
        before = state.tick()
        rows = corpus.batch(state.step, settings.batch_size)
        tokens = sum(label != IGNORED for row in rows for label in row.labels)
        torch.manual_seed(settings.seed * 1_000_003 + state.step)  # dropout is a function of the step: resume is exact
        loss = 0.0
        for start in range(0, len(rows), settings.micro_batch_size):
            if is_cancelled():
                trainee.drop_gradients()
                raise JobCancelled(f"cancelled after step {state.step}")
            loss += trainee.accumulate(rows[start : start + settings.micro_batch_size], tokens)
        trainee.take_gradients()
        norm = torch.nn.utils.clip_grad_norm_(trainee.masters.values(), settings.max_grad_norm)
        _check_finite(loss + float(norm), settings, state)
        rate = learning_rate(settings, state.step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        trainee.publish()
        state.step += 1
        state.step_seconds = state.tick() - before
        yield StepDone(state.step, loss / tokens, rate, float(norm), tokens, state.step_seconds)
        yield from _after_step(trainee, settings, test, state, is_cancelled, is_new=True)


def learning_rate(settings: Settings, step: int) -> float:
    """Rises linearly over the warmup, then falls linearly to a tenth of the peak, where it stays.

    Args:
        step: from 0.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = min(1.0, (step - settings.warmup_steps) / settings.decay_steps)
    return settings.learning_rate * (1 - 0.9 * done)


def _after_step(
    trainee: Trainee,
    settings: Settings,
    test: HeldOut,
    state: State,
    is_cancelled: Callable[[], bool],
    *,
    is_new: bool,
) -> Iterator[Event]:
    """The evaluation and the checkpoint that are due at this step, and whether it was the last one.

    Args:
        is_new: whether the step was taken just now; if not, its checkpoint is kept already.
    """
    # The next step would have to be followed by the last evaluation and the last checkpoint.
    needed = state.step_seconds + state.evaluation_seconds + state.commit_seconds
    out_of_time = settings.time_limit_seconds is not None and state.seconds + needed >= settings.time_limit_seconds
    last = state.step >= settings.train_steps or out_of_time
    evaluated = None
    if last or state.step % settings.eval_steps == 0:
        evaluated = _evaluate(trainee, settings, test, state, is_cancelled)
        yield evaluated
    impatient = 0 < settings.early_stopping_patience <= state.evaluations_without_gain
    if last or impatient:
        state.ended = "out of time" if out_of_time else "no gain" if impatient else "all steps done"
    is_best = evaluated is not None and state.best_step == state.step
    if is_best or state.ended or (is_new and state.step % settings.checkpoint_steps == 0):
        before = state.tick()
        yield CheckpointDue(state.step, evaluated.test.loss if evaluated else None, is_best)
        state.commit_seconds = state.tick() - before


def _evaluate(
    trainee: Trainee, settings: Settings, test: HeldOut, state: State, is_cancelled: Callable[[], bool]
) -> Evaluated:
    before = state.tick()
    found = test.evaluate(trainee, settings.micro_batch_size, is_cancelled)
    _check_finite(found.loss, settings, state)
    state.evaluated_step = state.step
    is_base = state.base_loss is None
    if is_base:
        state.base_loss = state.best_loss = found.loss
    elif state.best_loss is None or found.loss < state.best_loss:
        state.best_loss, state.best_step, state.evaluations_without_gain = found.loss, state.step, 0
    else:
        state.evaluations_without_gain += 1
    state.evaluation_seconds = state.tick() - before
    return Evaluated(state.step, found, state.evaluation_seconds, is_base)


def _check_finite(value: float, settings: Settings, state: State) -> None:
    """Stops before a loss or gradient that is no number reaches the weights, or a checkpoint."""
    if math.isfinite(value):
        return
    if state.base_loss is None:
        raise TrainingDiverged("the base model's own test loss is no number", field="base_model", hint="Take another.")
    raise TrainingDiverged(
        f"loss or gradient became infinite after step {state.step}, at a peak learning rate of "
        f"{settings.learning_rate:g}",
        field="hyperparameters.learning_rate",
        hint="Lower the learning rate, or raise warmup_steps; the last checkpoint stays.",
    )
