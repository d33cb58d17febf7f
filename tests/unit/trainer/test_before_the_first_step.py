"""A run that is stopped before its first step leaves the adapter that it would have begun with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from codegraft.trainer.v1.training_pb2 import TrainingMessage
from services.core.errors import JobCancelled
from services.core.models import weights
from services.trainer import rank
from services.trainer.launch.folder import RunFolder
from services.trainer.model.lora import CONFIG, WEIGHTS
from tests.unit.trainer.folders import prepared


class StopsAfter(RunFolder):
    """A folder whose run is asked to stop as soon as it has told something of that kind."""

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(path)
        self._kind = kind

    def is_stopped(self) -> bool:
        return any(message.HasField(self._kind) for message in self.read()[0])  # type: ignore[arg-type]


def train(folder: RunFolder) -> list[TrainingMessage]:
    rank.train(folder)
    return folder.read()[0]


def is_fresh(adapter: Path) -> bool:
    """Whether it changes nothing yet, but can learn: B is zero, A is not."""
    return all(tensor.any() == (".lora_A." in name) for name, tensor in load_file(adapter / WEIGHTS).items())


@pytest.fixture
def earlier(base: Path, tmp_path: Path) -> Path:
    """Folder of an adapter that learned something."""
    story = train(prepared(tmp_path / "earlier", base, train_steps=1, eval_steps=1))
    return Path([message.checkpoint for message in story if message.HasField("checkpoint")][-1].adapter_path)


@pytest.mark.parametrize("kind", ["loaded", "base_evaluation"])
@pytest.mark.parametrize("continues", [False, True])
def test_stopped_before_the_first_step_it_leaves_step_0(
    base: Path, tmp_path: Path, kind: str, continues: bool, request: pytest.FixtureRequest
) -> None:
    folder = StopsAfter(prepared(tmp_path / "run", base, train_steps=2, eval_steps=2).path, kind)
    spec = folder.spec()
    if continues:
        spec.initial_path = str(request.getfixturevalue("earlier"))
        spec.initial.CopyFrom(AdapterManifest(lora_r=4, lora_alpha=8, base_digest=weights.base_digest(base)))
        folder.prepare(spec)
    story = train(folder)
    assert isinstance(folder.failure(), JobCancelled)
    left = story[-1].checkpoint
    assert (left.step, left.best, left.HasField("test_loss"), left.state_path) == (0, False, False, "")
    adapter = Path(left.adapter_path)
    assert sorted(file.name for file in adapter.iterdir() if file.suffix != ".md") == [CONFIG, WEIGHTS]
    if continues:
        earlier = load_file(Path(spec.initial_path) / WEIGHTS)
        assert not is_fresh(adapter)
        assert all(torch.equal(tensor, earlier[name]) for name, tensor in load_file(adapter / WEIGHTS).items())
    else:
        assert is_fresh(adapter)
    folder.release(left)  # as the worker does it
    assert not adapter.exists()


def test_what_starts_over_tells_the_same(base: Path, tmp_path: Path) -> None:
    """A run that is resumed, or whose processes start again, after it was stopped before its first step."""
    whole = train(prepared(tmp_path / "whole", base, train_steps=2, eval_steps=2))
    folder = StopsAfter(prepared(tmp_path / "run", base, train_steps=2, eval_steps=2).path, "base_evaluation")
    before = len(train(folder))
    (folder.path / "failure.binpb").unlink()
    again = train(RunFolder(folder.path))[before:]
    assert again[0].loaded.step == 0
    assert [m.checkpoint.sha256 for m in again if m.HasField("checkpoint")] == [
        m.checkpoint.sha256 for m in whole if m.HasField("checkpoint")
    ]
