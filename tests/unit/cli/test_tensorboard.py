"""TensorBoard's files hold the run's story: read back record by record, with their checksums."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event

from codegraft.trainer.v1 import run_pb2
from codegraft.trainer.v1.hyperparameters_pb2 import Plan, PlannedSetting
from codegraft.trainer.v1.run_event_pb2 import EvalMetrics, RunEvent, StepMetrics
from services.cli import tensorboard
from services.core.errors import FailedPrecondition

PLAN = Plan(settings=[PlannedSetting(name="lora_r", value="16", why="enough"), PlannedSetting(name="seed", given=True)])
BASE = EvalMetrics(step=0, test_loss=1.5, tokens=100, source_losses={"projects/p/sources/app": 1.25})
STORY = [
    RunEvent(plan=PLAN),
    RunEvent(evaluation=BASE),
    RunEvent(step=StepMetrics(step=1, train_loss=1.5, learning_rate=0.25, grad_norm=2.0, tokens_per_second=700.0)),
    RunEvent(note="nothing to draw"),
    RunEvent(step=StepMetrics(step=2, train_loss=1.25, learning_rate=0.125)),
]
for _number, _event in enumerate(STORY):
    _event.sequence = _number + 1
    _event.time.FromMilliseconds(1_700_000_000_500 + 1000 * _number)


def records(file: Path) -> Iterator[Event]:
    """The events of a file of TFRecords: length, its masked CRC32C, bytes, their masked CRC32C."""

    def check(data: bytes, masked: bytes) -> None:
        crc = crc32c(data)
        assert ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF == struct.unpack("<I", masked)[0]

    content = file.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        check(content[:8], content[8:12])
        check(content[12 : 12 + length], content[12 + length : 16 + length])
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def read(folder: Path) -> tuple[dict[str, list[tuple[int, float, float]]], str]:
    """(step, value, time) by tag, and the text."""
    (file,) = folder.iterdir()
    found: dict[str, list[tuple[int, float, float]]] = {}
    text = ""
    for event in records(file):
        for value in event.summary.value:
            if value.tag.startswith("plan"):
                text = value.tensor.string_val[0].decode()
            else:
                found.setdefault(value.tag, []).append((event.step, value.simple_value, event.wall_time))
    return found, text


def test_every_number_is_there_at_its_step_and_time(tmp_path: Path) -> None:
    count = tensorboard.write(STORY, tmp_path)
    found, text = read(tmp_path)
    assert found["step/train_loss"] == [(1, 1.5, 1_700_000_002.5), (2, 1.25, 1_700_000_004.5)]
    assert [value for _, value, _ in found["step/learning_rate"]] == [0.25, 0.125]
    assert found["step/grad_norm"][0][1] == 2.0 and found["step/tokens_per_second"][0][1] == 700.0
    assert found["evaluation/test_loss"] == [(0, 1.5, 1_700_000_001.5)]
    assert found["evaluation/source_losses/app"][0][1] == 1.25
    assert count == sum(map(len, found.values()))
    assert "| lora_r | 16 | enough |" in text and "| given |" in text


def test_another_export_replaces_the_first_one_and_nothing_else(tmp_path: Path) -> None:
    tensorboard.write(STORY[:3], tmp_path)
    tensorboard.write(STORY, tmp_path)
    assert len(read(tmp_path)[0]["step/train_loss"]) == 2
    (tmp_path / "events.out.tfevents.1.mine").write_text("mine")
    tensorboard.write(STORY, tmp_path)
    assert sorted(path.name.rpartition(".")[2] for path in tmp_path.iterdir()) == ["codegraft", "mine"]


def test_a_folder_that_cannot_be_written_and_a_library_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FailedPrecondition, match="cannot be written"):
        tensorboard.write(STORY, tmp_path / "file" / "below")
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(FailedPrecondition, match="not installed") as caught:
        tensorboard.write(STORY, tmp_path)
    assert "codegraft[plot]" in caught.value.hint


def test_the_command_writes_into_a_folder_of_the_run(fake: Any, codegraft: Callable[..., Any], tmp_path: Path) -> None:
    run = run_pb2.Run(name="projects/acme/runs/r-1", last_sequence=len(STORY))
    fake.answers["GetRun"] = run_pb2.GetRunResponse(run=run)
    fake.answers["WatchRun"] = [run_pb2.WatchRunResponse(run=run, event=event) for event in STORY]
    done = codegraft("train", "tensorboard", "-p", "acme", "-o", str(tmp_path))
    assert done.code == 0 and "tensorboard --logdir" in done.err
    assert read(tmp_path / "r-1")[0]["evaluation/test_loss"]
    fake.answers["GetRun"] = run_pb2.GetRunResponse(run=run_pb2.Run(name="projects/acme/runs/r-2"))
    assert codegraft("train", "tensorboard", "r-2", "-p", "acme", "-o", str(tmp_path)).code == 4
