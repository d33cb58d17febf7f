"""The training loop. It yields what happens and stops between two steps, so that whoever runs it decides the rest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from codegraft.trainer.v1.run_event_pb2 import Proof
from services.core.errors import JobCancelled, TrainingDiverged
from services.trainer.corpus.data import IGNORED, Corpus
from services.trainer.model.lora import Trainee
from services.trainer.planning.settings import Settings
from services.trainer.proving.evaluate import HeldOut, HeldOutLoss
from services.trainer.proving.proof import Exam, Measures, forgets, judge
from services.trainer.ranks import ALONE, Ranks


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
    foreign_loss: float | None = None
    """Nats per token; None where it was not measured."""
    refused: str = ""
    """Why the adapter is not the best although its test loss is the lowest."""


@dataclass(frozen=True, slots=True)
class CheckpointDue:
    """The adapter as it is now should be kept."""

    step: int
    test_loss: float | None
    """None between evaluations."""
    is_best: bool
    """Lowest test loss so far, below the base model's, and no harm to foreign code."""


@dataclass(frozen=True, slots=True)
class Proved:
    """The best adapter was judged against the base model."""

    proof: Proof
    """Without the checkpoint's name."""


Event = StepDone | Evaluated | CheckpointDue | Proved
Story = Iterator[Event]


@dataclass(slots=True)
class State:
    """Where a run is; with the masters and the optimizer all that a later process needs to go on exactly."""

    step: int = 0
    seconds: float = 0.0
    """Time spent, earlier processes included as far as their kept states tell: what came after the last one is not
    counted, and a limit gives it again."""
    base_loss: float | None = None
    best_loss: float | None = None
    """Test loss of the best version so far, the base model included."""
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
    proof_seconds: float = 0.0
    """What the base model's lines took; the best one's will take as much."""
    lowest_loss: float | None = None
    """Lowest test loss after a step, whether that version may be the best or not."""
    base: Measures | None = None
    best: Measures | None = None
    """None while no step has led to a best one."""
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    proved: bool = False
    """Whether the proof is made; kept with the run's record, not with this state."""
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
    exam: Exam | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[Event]:
    """Trains from ``state`` to the end of the settings, the time limit or the patience; then the best is judged.

    With more ranks every one of them runs this loop, over its share of each batch, and yields the same events.

    Args:
        initial: puts the weights of an earlier adapter on the trainee; None for a run that starts afresh. A best
            checkpoint then beats that adapter as well as the base model.
        exam: what is asked of base and adapter beside the test loss; None leaves it at that.

    Raises:
        JobCancelled: it was asked for; the model stands after the last whole step.
        TrainingDiverged: a loss or a gradient is no finite number; the model stands after the last good step.
    """
    is_cancelled = ranks.agreed(is_cancelled)
    state.tick()
    if state.step == 0 and state.base_loss is None:
        # A fresh adapter is zero, so that this is the base model's loss.
        yield _evaluate(trainee, settings, test, exam, state, is_cancelled, ranks)
        if initial is not None:
            initial()
            yield _evaluate(trainee, settings, test, exam, state, is_cancelled, ranks)
            state.evaluations_without_gain = 0
    if state.step and not state.ended and state.evaluated_step != state.step:
        # An earlier process may have been stopped in the middle of this evaluation.
        yield from _after_step(trainee, settings, test, exam, state, is_cancelled, ranks, is_new=False)
    while not state.ended:
        before = state.tick()
        rows = corpus.batch(state.step, settings.batch_size)
        tokens = sum(label != IGNORED for row in rows for label in row.labels)
        share = ranks.share(rows)
        # Dropout is a function of step and rank: resume is exact.
        torch.manual_seed((settings.seed * 1_000_003 + state.step + (ranks.rank << 40)) % 2**63)
        loss = 0.0
        for start in range(0, len(share), settings.micro_batch_size):
            if is_cancelled():
                trainee.drop_gradients()
                raise JobCancelled(f"cancelled after step {state.step}")
            loss += trainee.accumulate(share[start : start + settings.micro_batch_size], tokens)
        trainee.take_gradients()
        ranks.sum_gradients(trainee.masters.values())
        [loss] = ranks.sum([loss])
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
        yield from _after_step(trainee, settings, test, exam, state, is_cancelled, ranks, is_new=True)
    if exam is not None and not state.proved:
        yield from _prove(trainee, settings, exam, state, is_cancelled)


def nothing_best(state: State, rivals: str) -> str:
    """What to tell of a run that published nothing as best.

    Args:
        rivals: what had to be beaten, in words.
    """
    lowest, best = state.lowest_loss or 0.0, state.best_loss or 0.0
    figures = f"test loss {lowest:.4f} at best, of {rivals} {best:.4f}"
    if lowest < best:
        return f"no checkpoint is published as best: each that is better raises the loss on foreign code ({figures})"
    return f"no checkpoint is better than {rivals}, so none is published as best ({figures})"


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
    exam: Exam | None,
    state: State,
    is_cancelled: Callable[[], bool],
    ranks: Ranks,
    *,
    is_new: bool,
) -> Iterator[Event]:
    """The evaluation and the checkpoint that are due at this step, and whether it was the last one.

    Args:
        is_new: whether the step was taken just now; if not, its checkpoint is kept already.
    """
    due = state.step % settings.eval_steps == 0
    kept = state.step % settings.checkpoint_steps == 0
    limit = settings.time_limit_seconds
    needed = _seconds_for_another_step(state, due=due, kept=kept)
    out_of_time = ranks.any(limit is not None and state.seconds + needed >= limit)
    last = state.step >= settings.train_steps or out_of_time
    evaluated = None
    if last or due:
        evaluated = _evaluate(trainee, settings, test, exam, state, is_cancelled, ranks)
        yield evaluated
    impatient = 0 < settings.early_stopping_patience <= state.evaluations_without_gain
    if last or impatient:
        state.ended = "out of time" if out_of_time else "no gain" if impatient else "all steps done"
    is_best = evaluated is not None and state.best_step == state.step
    if is_best or state.ended or (is_new and kept):
        before = state.tick()
        yield CheckpointDue(state.step, evaluated.test.loss if evaluated else None, is_best)
        state.commit_seconds = state.tick() - before


def _seconds_for_another_step(state: State, *, due: bool, kept: bool) -> float:
    """What is to come if the run goes on: what is due now, a step, the last evaluation and checkpoint, the proof."""
    closing = state.evaluation_seconds + state.commit_seconds
    due_now = closing if due else state.commit_seconds if kept else 0.0
    return due_now + state.step_seconds + closing + state.proof_seconds


def _evaluate(
    trainee: Trainee,
    settings: Settings,
    test: HeldOut,
    exam: Exam | None,
    state: State,
    is_cancelled: Callable[[], bool],
    ranks: Ranks,
) -> Evaluated:
    """The test loss; of the base model, and of what would be the best, also what else the exam asks."""
    before = state.tick()
    found = test.evaluate(trainee, settings.micro_batch_size, is_cancelled, ranks)
    _check_finite(found.loss, settings, state)
    measures, refused = Measures(found.loss, found.by_file), ""
    is_base = state.base_loss is None
    is_lowest = state.best_loss is None or found.loss < state.best_loss
    if is_lowest and exam is not None:
        exam.add_foreign_loss(trainee, measures, settings.micro_batch_size, is_cancelled, ranks)
        if state.base is not None:
            refused = forgets(state.base, measures, settings.max_foreign_loss_increase)
    state.evaluation_seconds = state.tick() - before
    if is_base and exam is not None:
        exam.add_lines(trainee, measures, is_cancelled)
        state.proof_seconds = state.tick() - before - state.evaluation_seconds
    if is_base:
        state.base_loss = state.best_loss = found.loss
        state.base = measures
    elif is_lowest and not refused:
        state.best_loss, state.best_step, state.evaluations_without_gain = found.loss, state.step, 0
        if state.step:
            state.best, state.best_weights = measures, trainee.weights()
    else:
        state.evaluations_without_gain += 1
    if state.step:
        state.lowest_loss = min(found.loss, state.lowest_loss or found.loss)
    state.evaluated_step = state.step
    return Evaluated(state.step, found, state.evaluation_seconds, is_base, measures.foreign_loss, refused)


def _prove(
    trainee: Trainee, settings: Settings, exam: Exam, state: State, is_cancelled: Callable[[], bool]
) -> Iterator[Proved]:
    """Lets the best adapter write the lines that the base model wrote before the first step."""
    if state.base is None or state.best is None:
        return
    before = state.tick()
    trainee.wear(state.best_weights)
    try:
        exam.add_lines(trainee, state.best, is_cancelled)
    finally:
        trainee.publish()
    state.proved = True
    yield Proved(judge(state.base, state.best, seed=settings.seed, seconds=state.tick() - before))


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
