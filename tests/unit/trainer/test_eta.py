"""Whether a run's end is foretold, on clocks that the tests keep."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.planning.settings import Settings
from services.trainer.run.eta import Estimate
from tests.unit.trainer.conftest import SMALL


def chosen(**changed: Any) -> Settings:
    return Settings(**{**SMALL, "train_steps": 100, "eval_steps": 10, "checkpoint_steps": 25, **changed})


def simulate(
    settings: Settings, step: Callable[[int], float], evaluation: float, commit: float, proof: float = 0.0
) -> Iterator[tuple[int, float, float | None]]:
    """After each step: its number, the time by then, and what was said to be left. The end comes as step -1."""
    estimate, clock = Estimate(settings), evaluation
    estimate.evaluation(0, evaluation)
    for number in range(1, settings.train_steps + 1):
        clock += step(number)
        estimate.step(step(number))
        yield number, clock, estimate.left(number, clock, proof)
        last = number == settings.train_steps
        if last or number % settings.eval_steps == 0:
            clock += evaluation
            estimate.evaluation(number, evaluation)
        if last or number % settings.checkpoint_steps == 0:
            estimate.commit(commit)  # training goes on meanwhile
    yield -1, clock + max(commit, proof), None


@pytest.mark.parametrize("evaluation", [0.5, 12.0, 40.0])
def test_after_a_tenth_the_end_is_known_within_a_fifth(evaluation: float) -> None:
    """Also where evaluations take longer than all the steps between them, which a rate of steps knows nothing of."""
    rng = random.Random(1)
    noise = {number: rng.uniform(1.7, 2.3) for number in range(1, 101)}
    noise[9] = 30.0  # the machine was busy for a moment
    told = list(simulate(chosen(), noise.__getitem__, evaluation, 1.0, proof=10.0))
    end = told[-1][1]
    for _, clock, left in told[9:-2]:
        assert left == pytest.approx(end - clock, rel=0.2, abs=3)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_steady_parts_are_foretold_exactly(steps: int, eval_steps: int, checkpoint_steps: int) -> None:
    settings = chosen(train_steps=steps, eval_steps=eval_steps, checkpoint_steps=checkpoint_steps)
    told = list(simulate(settings, lambda _: 2.0, 5.0, 3.0, proof=4.0))
    for _, clock, left in told[:-1]:
        assert left == pytest.approx(told[-1][1] - clock)


def test_a_time_limit_is_the_end_at_the_latest_and_nothing_is_said_before_a_step() -> None:
    estimate = Estimate(chosen(time_limit_seconds=60.0), evaluated_step=20, evaluation_seconds=4.0)
    assert estimate.left(20, 30.0) is None
    estimate.step(2.0)
    assert estimate.left(21, 32.0) == 28.0
    fast = Estimate(chosen(), evaluated_step=20, evaluation_seconds=4.0)
    fast.step(0.1)
    assert fast.left(20, 30.0) == pytest.approx(80 * 0.1 + 8 * 4.0)
