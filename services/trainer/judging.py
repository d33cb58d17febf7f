"""What a training loop does between its steps: evaluations, checkpoints that are due, the end, and the proof."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from services.core.errors import TrainingDiverged
from services.trainer.model.lora import Trainee
from services.trainer.planning.settings import Settings
from services.trainer.proving.evaluate import HeldOut
from services.trainer.proving.proof import Exam, Measures, forgets, judge
from services.trainer.ranks import Ranks
from services.trainer.state import State
from services.trainer.story import CheckpointDue, Evaluated, Event, Proved


@dataclass(frozen=True, slots=True)
class Judge:
    """Judges one run, and notes in its state what came of it. For the fields see services/trainer/loop.

    With more ranks ``is_cancelled`` is each one's own question.
    """

    trainee: Trainee
    settings: Settings
    test: HeldOut
    exam: Exam | None
    state: State
    is_cancelled: Callable[[], bool]
    ranks: Ranks

    def evaluate(self) -> Evaluated:
        """The test loss; of the base model, and of what would be the best, also what else the exam asks."""
        settings, state, exam = self.settings, self.state, self.exam
        before, is_cancelled = state.tick(), self.ranks.agreed(self.is_cancelled)
        found = self.test.evaluate(self.trainee, settings.micro_batch_size, is_cancelled, self.ranks)
        check_finite(found.loss, settings, state)
        measures, refused = Measures(found.loss, found.by_file), ""
        is_base = state.base_loss is None
        is_lowest = state.best_loss is None or found.loss < state.best_loss
        if is_lowest and exam is not None:
            exam.add_foreign_loss(self.trainee, measures, settings.micro_batch_size, is_cancelled, self.ranks)
            if state.base is not None:
                refused = forgets(state.base, measures, settings.max_foreign_loss_increase)
        state.evaluation_seconds = state.tick() - before
        if is_base and exam is not None:
            exam.add_lines(self.trainee, measures, self.is_cancelled, self.ranks)
            state.proof_seconds = state.tick() - before - state.evaluation_seconds
        if is_base:
            state.base_loss = state.best_loss = found.loss
            state.base = measures
        elif is_lowest and not refused:
            state.best_loss, state.best_step, state.evaluations_without_gain = found.loss, state.step, 0
            if state.step:
                state.best, state.best_weights = measures, self.trainee.weights()
        else:
            state.evaluations_without_gain += 1
        if state.step:
            state.lowest_loss = min(found.loss, state.lowest_loss or found.loss)
        state.evaluated_step = state.step
        return Evaluated(state.step, found, state.evaluation_seconds, is_base, measures.foreign_loss, refused)

    def after_step(self, *, is_new: bool) -> Iterator[Event]:
        """The evaluation and the checkpoint that are due at this step, and whether it was the last one.

        Args:
            is_new: whether the step was taken just now; if not, its checkpoint is kept already.
        """
        settings, state = self.settings, self.state
        due = state.step % settings.eval_steps == 0
        kept = state.step % settings.checkpoint_steps == 0
        limit = settings.time_limit_seconds
        needed = _seconds_for_another_step(state, due=due, kept=kept)
        out_of_time = self.ranks.any(limit is not None and state.seconds + needed >= limit)
        last = state.step >= settings.train_steps or out_of_time
        evaluated = None
        if last or due:
            evaluated = self.evaluate()
            yield evaluated
        impatient = 0 < settings.early_stopping_patience <= state.evaluations_without_gain
        if last or impatient:
            state.ended = "out of time" if out_of_time else "no gain" if impatient else "all steps done"
        is_best = evaluated is not None and state.best_step == state.step
        if is_best or state.ended or (is_new and kept):
            before = state.tick()
            yield CheckpointDue(state.step, evaluated.test.loss if evaluated else None, is_best)
            state.commit_seconds = state.tick() - before

    def prove(self) -> Iterator[Proved]:
        """Lets the best adapter write the lines that the base model wrote before the first step."""
        state, exam = self.state, self.exam
        if exam is None or state.proved or state.base is None or state.best is None:
            return
        before = state.tick()
        self.trainee.wear(state.best_weights)
        try:
            exam.add_lines(self.trainee, state.best, self.is_cancelled, self.ranks)
        finally:
            self.trainee.publish()
        state.proved = True
        yield Proved(judge(state.base, state.best, seed=self.settings.seed, seconds=state.tick() - before))


def _seconds_for_another_step(state: State, *, due: bool, kept: bool) -> float:
    """What is to come if the run goes on: what is due now, a step, the last evaluation and checkpoint, the proof."""
    closing = state.evaluation_seconds + state.commit_seconds
    due_now = closing if due else state.commit_seconds if kept else 0.0
    return due_now + state.step_seconds + closing + state.proof_seconds


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


def check_finite(value: float, settings: Settings, state: State) -> None:
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
