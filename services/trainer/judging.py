"""What a training loop does between its steps: evaluations, checkpoints that are due, the end, and the proof."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from services.core.errors import TrainingDiverged
from services.trainer.model.lora import Trainee
from services.trainer.planning.settings import Settings
from services.trainer.proving.evaluate import HeldOut, HeldOutLoss
from services.trainer.proving.proof import Exam, Measures, foreign_rise, forgets, judge
from services.trainer.ranks import Ranks
from services.trainer.state import State
from services.trainer.story import CheckpointDue, Evaluated, Event, Proved

_LEAST_STRENGTH = 0.1
"""Share of an adapter below which it is not worth another evaluation."""
_CAUTION = 0.95
"""Of the strength that a parabola allows: the loss is not quite one."""
_TRIES = 3
"""Strengths whose loss on foreign code is measured."""


@dataclass(frozen=True, slots=True)
class Version:
    """What may be the best: the adapter, or a share of it."""

    measures: Measures
    strength: float


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
        before = state.tick()
        found = self._test()
        check_finite(found.loss, settings, state)
        measures, refused = Measures(found.loss, found.by_file), ""
        version = Version(measures, 1.0)
        is_base = state.base_loss is None
        is_lowest = state.best_loss is None or found.loss < state.best_loss
        if is_lowest:
            self._add_foreign_loss(measures)
            if state.base is not None and (refused := self._forgets(measures)) and state.step:
                version, told = self._weakened(measures)
                refused += told
        state.evaluation_seconds = state.tick() - before
        if is_base and exam is not None:
            exam.add_lines(self.trainee, measures, self.is_cancelled, self.ranks)
            state.proof_seconds = state.tick() - before - state.evaluation_seconds
        if is_base:
            state.base_loss = state.best_loss = found.loss
            state.base = measures
        elif is_lowest and (version.strength < 1 or not refused):
            state.best_step, state.evaluations_without_gain = state.step, 0
            state.best_loss = version.measures.test_loss
            if state.step:
                state.best, state.best_strength = version.measures, version.strength
                state.best_weights = self.trainee.weights(version.strength)
        else:
            state.evaluations_without_gain += 1
        if state.step:
            state.lowest_loss = min(found.loss, state.lowest_loss or found.loss)
        state.evaluated_step = state.step
        return Evaluated(state.step, found, state.evaluation_seconds, is_base, measures.foreign_loss, refused)

    def _weakened(self, whole: Measures) -> tuple[Version, str]:
        """The adapter with as much of its strength as does no more harm than is allowed, and what to tell of it.

        Where base and adapter are connected by a low path (WiSE-FT, arXiv:2109.01903) the loss on foreign code grows
        with about the square of the strength, and what is gained on the test set falls slower than that. The version is
        the whole adapter where a weaker one could not be the best either.
        """
        state, limit = self.state, self.settings.max_foreign_loss_increase
        assert state.base is not None and state.best_loss is not None
        strength, found = 1.0, whole
        try:
            for _ in range(_TRIES):
                self.trainee.publish()  # a share of the whole, not of the last try
                strength *= _CAUTION * math.sqrt(limit / foreign_rise(state.base, found))
                if strength < _LEAST_STRENGTH:
                    return Version(whole, 1.0), ""
                self.trainee.wear(self.trainee.weights(strength))
                found = Measures(whole.test_loss, whole.by_file)
                self._add_foreign_loss(found)
                if not self._forgets(found):
                    break
            else:
                return Version(whole, 1.0), ""
            test = self._test()
        finally:
            self.trainee.publish()
        told = f"; with {strength:.2f} of its strength the test loss is {test.loss:.4f}"
        if test.loss >= state.best_loss:
            return Version(whole, 1.0), told
        return Version(
            Measures(test.loss, test.by_file, found.foreign_loss), strength
        ), told + ", and that is published"

    def _test(self) -> HeldOutLoss:
        is_cancelled = self.ranks.agreed(self.is_cancelled)
        return self.test.evaluate(self.trainee, self.settings.micro_batch_size, is_cancelled, self.ranks)

    def _add_foreign_loss(self, measures: Measures) -> None:
        if self.exam is not None:
            is_cancelled = self.ranks.agreed(self.is_cancelled)
            batch = self.settings.micro_batch_size
            self.exam.add_foreign_loss(self.trainee, measures, batch, is_cancelled, self.ranks)

    def _forgets(self, measures: Measures) -> str:
        assert self.state.base is not None
        return forgets(self.state.base, measures, self.settings.max_foreign_loss_increase)

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
            loss = state.best_loss if is_best else evaluated.test.loss if evaluated else None
            yield CheckpointDue(state.step, loss, is_best)
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
