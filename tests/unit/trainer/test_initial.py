"""Runs that start from an earlier adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters, Plan, PlannedSetting
from services.core import errors
from services.trainer import checkpoint, loop
from services.trainer.planning.initial import explain, inherited
from services.trainer.proving.evaluate import HeldOut
from services.trainer.state import State
from services.trainer.story import CheckpointDue, Evaluated

Make = Callable[..., Any]
MANIFEST = AdapterManifest(lora_r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"lora_r": 8}, "lora_r"),
        ({"lora_alpha": 16}, "lora_alpha"),
        ({"target_modules": ["q_proj"]}, "target_modules"),
        ({"lora_init_scale": 0.1}, "lora_init_scale"),
    ],
)
def test_another_shape_is_refused_with_its_field(asked: dict[str, Any], field: str) -> None:
    with pytest.raises(errors.InvalidHyperparameter) as caught:
        inherited(Hyperparameters(**asked), MANIFEST)
    assert caught.value.field == f"hyperparameters.{field}" and caught.value.hint


def test_the_shape_is_taken_over_and_told() -> None:
    asked = Hyperparameters(lora_r=4, seed=3)
    settled = inherited(asked, MANIFEST)
    assert (settled.lora_r, settled.lora_alpha, settled.seed) == (4, 8, 3)
    assert sorted(settled.target_modules) == sorted(MANIFEST.target_modules) and not asked.HasField("lora_alpha")
    told = Plan(
        settings=[
            PlannedSetting(name=name, value="4", given=True, why="as asked for")
            for name in ("lora_r", "lora_alpha", "target_modules", "seed")
        ]
    )
    explain(told, asked, MANIFEST)
    assert [setting.given for setting in told.settings] == [True, False, False, True]
    assert "checkpoint" in told.settings[1].why and told.settings[1].value == "4"


def test_training_starts_where_the_adapter_stands_and_must_beat_it(
    settings: Make,
    trainee: Make,
    corpus: Make,
    held_out: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = settings()
    made = trainee(chosen)
    first = list(
        loop.train(
            made, loop.make_optimizer(made, chosen), chosen, corpus(chosen), held_out(chosen), State(), lambda: False
        )
    )
    checkpoint.save_adapter(made, tmp_path, "tiny")
    reached = [event.test.loss for event in first if isinstance(event, Evaluated)]

    again, state = trainee(chosen), State()
    losses = iter([None, None, 0.9 * reached[0] + 0.1 * reached[-1], 0.9 * reached[-1], 0.95 * reached[-1]])
    evaluate = HeldOut.evaluate

    def scripted(*arguments: Any) -> Any:
        """After a step: better than the base model only, then better than both, then than the base model again."""
        found, loss = evaluate(*arguments), next(losses)
        return found if loss is None else replace(found, loss=loss)

    monkeypatch.setattr(HeldOut, "evaluate", scripted)
    optimizer = loop.make_optimizer(again, chosen)
    put = lambda: checkpoint.load_adapter(again, tmp_path)  # noqa: E731
    story = list(loop.train(again, optimizer, chosen, corpus(chosen), held_out(chosen), state, lambda: False, put))
    base, start = [event for event in story if isinstance(event, Evaluated)][:2]
    assert (base.step, base.is_base, base.test.loss) == (0, True, reached[0])
    assert (start.step, start.is_base) == (0, False) and start.test.loss == pytest.approx(reached[-1], rel=1e-5)
    assert state.base_loss == reached[0] and reached[-1] < 0.98 * reached[0]
    assert [event.step for event in story if isinstance(event, CheckpointDue) and event.is_best] == [8]


def test_an_adapter_of_another_shape_is_refused(settings: Make, trainee: Make, tmp_path: Path) -> None:
    checkpoint.save_adapter(trainee(settings(lora_r=2)), tmp_path, "tiny")
    for folder in (tmp_path, tmp_path / "none"):
        made = trainee(settings())
        before = {name: master.clone() for name, master in made.masters.items()}
        with pytest.raises(errors.AdapterRejected) as caught:
            checkpoint.load_adapter(made, folder)
        assert caught.value.field == "initial_checkpoint"
        assert all(torch.equal(master, before[name]) for name, master in made.masters.items())
