"""Which devices a process works on, one run each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from services.core.jobs.runner import JobRunner
from services.core.runtime import Runtime
from services.trainer import assembly
from services.trainer.config import TrainerSettings


@pytest.mark.parametrize(
    ("each", "workers", "expected"),
    [
        (1, None, [("cuda:0",), ("cuda:2",)]),
        (1, 1, [("cuda:0",)]),
        (1, 9, [("cuda:0",), ("cuda:2",)]),
        (2, None, [("cuda:0", "cuda:2")]),
        (1, 0, []),
    ],
)
def test_every_device_has_one_runner(
    monkeypatch: pytest.MonkeyPatch, each: int, workers: int | None, expected: list[tuple[str, ...]]
) -> None:
    handled: list[Sequence[str]] = []

    class Worker:
        handle = None

        def __init__(self, *arguments: Any) -> None:
            handled.append(arguments[-1])

    monkeypatch.setattr(assembly, "RunWorker", Worker)
    settings = TrainerSettings(trainer_devices=("cuda:0", "cuda:2"), trainer_workers=workers, trainer_processes=each)
    made = assembly.Trainer(Runtime.memory(), settings, newest=None)  # type: ignore[arg-type]
    runners = [work for work in made.background if isinstance(getattr(work, "__self__", None), JobRunner)]
    assert handled == expected and len(runners) == len(expected)
