"""Which devices a process works on, one run each."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
import torch

from services.core.runtime import Runtime
from services.trainer import assembly, machine
from services.trainer.config import TrainerSettings


def test_devices_are_the_listed_ones_or_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.devices("auto", ("cuda:1", "cuda:3")) == ["cuda:1", "cuda:3"]
    assert machine.devices("cpu", ()) == ["cpu"]
    monkeypatch.setattr(machine.Path, "exists", lambda _: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert machine.devices("auto", ()) == ["cuda:0", "cuda:1", "cuda:2"]
    assert machine.devices("cpu", ()) == ["cpu"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert machine.devices("auto", ()) == ["auto"]
    assert machine.device("auto").type == "cpu"


@pytest.mark.parametrize(
    ("workers", "expected"), [(None, ["cuda:0", "cuda:2"]), (1, ["cuda:0"]), (9, ["cuda:0", "cuda:2"]), (0, [])]
)
async def test_every_device_has_one_runner(
    monkeypatch: pytest.MonkeyPatch, workers: int | None, expected: list[str]
) -> None:
    started: list[str] = []

    class Runner:
        def __init__(self, *arguments: Any, worker_id: str) -> None:
            started.append(worker_id.rsplit("-", 1)[1])

        async def run(self) -> None:
            await asyncio.sleep(60)

    monkeypatch.setattr(assembly, "JobRunner", Runner)
    settings = TrainerSettings(trainer_devices=("cuda:0", "cuda:2"), trainer_workers=workers)
    made = assembly.Trainer(Runtime.memory(), settings, newest=None)  # type: ignore[arg-type]
    working = asyncio.ensure_future(made.background[0]())
    await asyncio.wait({working}, timeout=0.2)
    working.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await working
    assert started == expected
