"""Loss curves: the right points, and a real picture of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from codegraft.trainer.v1.checkpoint_pb2 import Checkpoint
from codegraft.trainer.v1.run_event_pb2 import EvalMetrics, RunEvent, StepMetrics
from services.cli.plot import Curves, curves, draw
from services.core.errors import FailedPrecondition

STORY = [
    RunEvent(evaluation=EvalMetrics(step=0, test_loss=1.5)),
    RunEvent(step=StepMetrics(step=1, train_loss=1.4, learning_rate=5e-4)),
    RunEvent(note="something"),
    RunEvent(step=StepMetrics(step=2, train_loss=1.2, learning_rate=1e-3)),
    RunEvent(evaluation=EvalMetrics(step=2, test_loss=1.25)),
    RunEvent(best=Checkpoint(step=2, test_loss=1.25)),
]


def test_curves_of_a_story() -> None:
    assert curves(STORY) == Curves(
        train=[(1, 1.4), (2, 1.2)],
        test=[(0, 1.5), (2, 1.25)],
        best=(2, 1.25),
        learning_rate=[(1, 5e-4), (2, 1e-3)],
    )


@pytest.mark.parametrize("name", ["loss.png", "loss.svg"])
def test_the_picture_is_written(tmp_path: Path, name: str) -> None:
    draw(curves(STORY), "run", tmp_path / name)
    head = (tmp_path / name).read_bytes()[:200]
    assert head.startswith(b"\x89PNG") or b"<svg" in head or b"<?xml" in head


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="no loss yet"):
        draw(Curves(), "run", tmp_path / "loss.png")


def test_the_picture_has_every_curve(tmp_path: Path) -> None:
    draw(curves(STORY), "run", tmp_path / "loss.svg")
    told = (tmp_path / "loss.svg").read_text()
    for text in ("learning rate", "best 1.250", "test (held out)", "train"):
        assert f"<!-- {text} -->" in told  # as matplotlib tells what its glyphs say


@pytest.mark.parametrize("name", ["missing/loss.png", "loss.nonsense"])
def test_a_file_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(FailedPrecondition, match="cannot be written"):
        draw(curves(STORY), "run", tmp_path / name)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FailedPrecondition, match="matplotlib") as caught:
        draw(curves(STORY), "run", tmp_path / "loss.png")
    assert "codegraft[plot]" in caught.value.hint
