"""How a run ends before its last step: the time limit, and numbers that are none."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from codegraft.trainer.v1.training_pb2 import TrainingMessage
from services.core import errors
from services.trainer import loop, rank
from services.trainer.corpus.data import Row
from services.trainer.launch.folder import RunFolder
from services.trainer.proving.evaluate import HeldOut
from services.trainer.state import State
from services.trainer.story import CheckpointDue, Evaluated, StepDone
from tests.unit.trainer.folders import prepared

Make = Callable[..., Any]


class Clock:
    """Time that passes only by what is done."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("services.trainer.state.time", made)
    monkeypatch.setattr(State.__dataclass_fields__["_since"], "default_factory", made.monotonic)
    return made


@pytest.mark.parametrize("limit", [30.0, 47.0, 60.0])
def test_the_last_evaluation_and_checkpoint_fit_into_the_time_limit(
    settings: Make, trainee: Make, corpus: Make, held_out: Make, clock: Clock, limit: float, monkeypatch: Any
) -> None:
    chosen = settings(train_steps=1000, eval_steps=5, checkpoint_steps=5, time_limit_seconds=limit)
    made, evaluate = trainee(chosen), HeldOut.evaluate
    accumulate = made.accumulate

    def slow(rows: list[Row], tokens: int) -> float:
        clock.now += 0.5
        return float(accumulate(rows, tokens))

    def slower(*arguments: Any) -> Any:
        clock.now += 4.0
        return evaluate(*arguments)

    monkeypatch.setattr(made, "accumulate", slow)
    monkeypatch.setattr(HeldOut, "evaluate", slower)
    state = State(_since=0.0)
    events = []
    for event in loop.train(
        made, loop.make_optimizer(made, chosen), chosen, corpus(chosen), held_out(chosen), state, lambda: False
    ):
        events.append(event)
        clock.now += 1.5 if isinstance(event, CheckpointDue) else 0.01
    assert state.ended == "out of time"
    assert [type(event) for event in events[-3:]] == [StepDone, Evaluated, CheckpointDue]
    assert limit - 14 < clock.now <= limit


class Taken(RunFolder):
    """A folder whose checkpoints are taken at once, lest training wait for room."""

    def write(self, message: TrainingMessage) -> None:
        super().write(message)
        if message.HasField("checkpoint"):
            self.release(message.checkpoint)


def test_the_time_limit_holds_on_a_real_clock(base: Path, tmp_path: Path) -> None:
    """Of all that counts: loading, the dry run, evaluations, steps, checkpoints and the proof."""
    endless = {"train_steps": 1_000_000, "eval_steps": 50, "checkpoint_steps": 1_000_000}
    folder = Taken(prepared(tmp_path / "run", base, **endless, time_limit_seconds=3.0).path)
    began = time.monotonic()
    rank.train(folder)
    took = time.monotonic() - began
    story = folder.read()[0]
    assert folder.failure() is None and story[-1].ended.why == "out of time"
    assert 1.5 < took < 8  # all of its steps would take minutes; a busy machine may be late
    checkpoints = [message.checkpoint for message in story if message.HasField("checkpoint")]
    evaluations = [message.evaluation for message in story if message.HasField("evaluation")]
    assert checkpoints[-1].last and checkpoints[-1].step == evaluations[-1].step == story[-1].ended.step > 0
    assert any(checkpoint.best for checkpoint in checkpoints) and any(message.HasField("proof") for message in story)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_before_the_weights_know(
    settings: Make, trainee: Make, corpus: Make, held_out: Make, broken: float, monkeypatch: Any
) -> None:
    chosen = settings()
    made, state = trainee(chosen), State()
    accumulate = made.accumulate
    monkeypatch.setattr(made, "accumulate", lambda rows, n: accumulate(rows, n) + (broken if state.step == 5 else 0))
    story = loop.train(
        made, loop.make_optimizer(made, chosen), chosen, corpus(chosen), held_out(chosen), state, lambda: False
    )
    with pytest.raises(errors.TrainingDiverged) as caught:
        list(story)
    assert state.step == 5 and all(bool(torch.isfinite(master).all()) for master in made.masters.values())
    assert caught.value.field == "hyperparameters.learning_rate" and "learning rate" in caught.value.hint
    assert caught.value.is_callers_fault  # the same attempt would diverge again


def test_a_base_model_whose_loss_is_no_number_is_named(
    settings: Make, trainee: Make, corpus: Make, held_out: Make
) -> None:
    chosen = settings()
    made = trainee(chosen)
    with torch.no_grad():
        made._base.get_output_embeddings().weight.fill_(math.nan)
    story = loop.train(
        made, loop.make_optimizer(made, chosen), chosen, corpus(chosen), held_out(chosen), State(), lambda: False
    )
    with pytest.raises(errors.TrainingDiverged) as caught:
        next(story)
    assert caught.value.field == "base_model"
