"""Folders as the worker makes them, over the tiny model and a few lines of code; what is told in them, and by whom."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters
from codegraft.trainer.v1.training_pb2 import TrainingMessage, TrainingSpec
from services.trainer.config import TrainerSettings
from services.trainer.launch.folder import RunFolder
from tests.unit.trainer.conftest import documents

STEPS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "train_steps": 30,
    "eval_steps": 30,
    "checkpoint_steps": 10,
    "batch_size": 4,
    "micro_batch_size": 2,
    "context_length": 64,
    "lora_r": 4,
    "lora_dropout": 0.1,
    "early_stopping_patience": 0,
    "max_eval_tokens": 128,
}
"""Three checkpoints: as many as may wait for a worker. Little is evaluated, which would take most of the time."""


def prepared(path: Path, base: Path, **changed: Any) -> RunFolder:
    """A folder that is ready to start.

    Args:
        base: folder of the base model.
        changed: settings other than STEPS.
    """
    path.mkdir()
    for part, count in (("train", 8), ("test", 2)):
        rows = [{**dataclasses.asdict(one), "tokens": len(one.text), "loss": 1.5} for one in documents(count)]
        pq.write_table(pa.Table.from_pylist(rows), path / f"{part}.parquet")
    settings = TrainerSettings(trainer_device="cpu", trainer_threads=1, cache_dir=path / "cache")
    folder = RunFolder(path)
    folder.prepare(
        TrainingSpec(
            run="projects/p/runs/r",
            base_model=f"dir:{base}",
            requested=Hyperparameters(**{**STEPS, **changed}),
            train_path=str(path / "train.parquet"),
            test_path=str(path / "test.parquet"),
            settings=settings.model_dump_json(),
        )
    )
    return folder


def checkpoints_of(story: list[TrainingMessage]) -> list[tuple[int, str]]:
    return [(m.checkpoint.step, m.checkpoint.sha256) for m in story if m.HasField("checkpoint")]


def steps_of(story: list[TrainingMessage]) -> list[tuple[int, float]]:
    return [(message.step.step, message.step.train_loss) for message in story if message.HasField("step")]


def running_ranks() -> list[psutil.Process]:
    """Training processes under this one, by rank."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "services.trainer.launch.process" in process.cmdline():
                found[process.environ()["RANK"]] = process
    return [found[rank] for rank in sorted(found)]
