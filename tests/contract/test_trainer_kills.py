"""Exact resume: a real trainer process on real servers is killed again and again, and the adapter is the very same."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from codegraft.common.v1.job_pb2 import JOB_STATE_RUNNING, JOB_STATE_SUCCEEDED
from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters
from codegraft.trainer.v1.run_pb2 import Run
from services.core.config import CoreSettings
from services.core.jobs import is_final, new_status
from services.core.jobs.nats import STREAM, durable
from services.core.jobs.states import lease_left
from services.core.runtime import Runtime
from services.core.store.s3 import S3Address
from services.trainer.records import BUCKET, Tables
from services.trainer.servicer import KIND
from tests.conftest import standing_on
from tests.contract.test_trainer import DATASET, PROJECT, QUICK, commit_dataset
from tests.unit.inference.tiny import make_model, make_tokenizer

KILLS = 3
TRIES = 4
"""Of a kill that has to come before a run's end, which is half a second away: the machine may stand still meanwhile."""
SOON, LATE = 1, 120
"""Leases, in seconds: one that a test waits for, and one that it never sees end."""
SETTINGS = {
    **QUICK,
    "train_steps": 21,
    "eval_steps": 4,
    "checkpoint_steps": 3,
    "lora_dropout": 0.2,
    "max_eval_tokens": 256,
}


class Trainers:
    """Starts trainer processes, one at a time, without the seconds of importing torch each."""

    def __init__(self, settings: dict[str, str]) -> None:
        path = Path(__file__).with_name("trainer_process.py")
        self._nursery = subprocess.Popen(
            [sys.executable, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **settings},
        )
        assert self._nursery.stdin and self._nursery.stdout
        self._asks, self._answers = self._nursery.stdin, self._nursery.stdout
        self._child = 0

    def start(self, lease: int = SOON, beside: str = "") -> int:
        """A trainer; its process id.

        Args:
            lease: seconds after which a dead worker's job is taken over.
            beside: "beside" when another one may be started while it runs.
        """
        if not self._child:
            while (line := self._answers.readline().strip()) != "ready":
                assert line, "it ended"
        self._asks.write(f"{lease} {beside}\n")
        self._asks.flush()
        self._child = int(self._answers.readline())
        return self._child

    def kill(self) -> None:
        os.kill(self._child, signal.SIGKILL)

    def close(self) -> None:
        self._asks.close()
        if self._child:
            self.kill()
        self._nursery.wait(10)


@dataclass
class Scene:
    """The servers, and the processes on them."""

    runtime: Runtime
    tables: Tables
    trainers: Trainers
    base: Path

    async def create(self, name: str) -> Run:
        run = await self.tables.runs.create(
            Run(
                name=f"{PROJECT}/runs/{name}",
                dataset=DATASET,
                base_model=f"dir:{self.base}",
                requested=Hyperparameters(**SETTINGS),  # type: ignore[arg-type]
                status=new_status(),
            )
        )
        await self.runtime.jobs.submit(KIND, run.name)
        return run

    async def until(self, run: Run, reached: Any) -> Run:
        async with asyncio.timeout(60):
            async for now in self.tables.runs.watch(run.name):
                if reached(now):
                    return now
        raise AssertionError("deleted")

    async def sha256(self, run: Run) -> str:
        found = await self.tables.checkpoints.get(f"{run.name}/checkpoints/{SETTINGS['train_steps']}")
        return found.sha256


@pytest.fixture
def settings(own_nats_server: Any, s3_server: S3Address, tmp_path: Path) -> CoreSettings:
    return standing_on(own_nats_server, s3_server, tmp_path / "cache").model_copy(update={"s3_bucket": "kills"})


@pytest.fixture
def trainers(settings: CoreSettings) -> Iterator[Trainers]:
    environment = {
        "CODEGRAFT_NATS_URL": settings.nats_url,
        "CODEGRAFT_NATS_USER": settings.nats_user,
        "CODEGRAFT_NATS_PASSWORD": settings.nats_password.get_secret_value(),
        "CODEGRAFT_S3_ENDPOINT": settings.s3_endpoint,
        "CODEGRAFT_S3_ACCESS_KEY": settings.s3_access_key.get_secret_value(),
        "CODEGRAFT_S3_SECRET_KEY": settings.s3_secret_key.get_secret_value(),
        "CODEGRAFT_S3_BUCKET": settings.s3_bucket,
        "CODEGRAFT_CACHE_DIR": str(settings.cache_dir),
        "CODEGRAFT_TRAINER_DEVICE": "cpu",
        "CODEGRAFT_TRAINER_THREADS": "1",
        "CODEGRAFT_TRAINER_LAUNCHER": "thread",  # ends with the process, and starts at once
    }
    made = Trainers(environment)
    yield made
    made.close()


@pytest.fixture
async def scene(settings: CoreSettings, trainers: Trainers, tmp_path: Path) -> AsyncIterator[Scene]:
    torch.set_num_threads(1)
    folder = tmp_path / "base"
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    async with Runtime.open("test", settings) as runtime:
        await commit_dataset(runtime, tmp_path)
        yield Scene(runtime, Tables.of(runtime.state(BUCKET)), trainers, folder)


def _is_at(run: Run, attempt: int, step: int) -> bool:
    """Whether that attempt has begun, and the run reached the step once, or has ended. So it is also killed while it
    loads."""
    status = run.status
    is_there = status.state == JOB_STATE_RUNNING and status.epoch >= attempt and status.progress.done >= step
    return is_there or is_final(status)


async def test_killed_or_drained_at_any_moment_it_becomes_the_same_adapter(scene: Scene) -> None:
    scene.trainers.start()
    whole = await scene.create("whole")
    ended = await scene.until(whole, lambda now: is_final(now.status))
    assert ended.status.state == JOB_STATE_SUCCEEDED and ended.status.attempt == 1, ended.status

    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print("seed of the moments:", seed)
    for attempt in range(TRIES):
        killed = await scene.create(f"killed-{attempt}")
        for number in range(KILLS):
            step = rng.randrange(1 + number * 7, 8 + number * 7)
            at = await scene.until(killed, lambda now, step=step, number=number: _is_at(now, number + 1, step))
            assert is_final(at.status) or lease_left(at.status).total_seconds() <= SOON
            await asyncio.sleep(rng.uniform(0.0, 0.2))  # a step takes about 10 ms, a commit about 100
            scene.trainers.kill()
            scene.trainers.start()
        last = await scene.until(killed, lambda now: is_final(now.status))
        if last.status.attempt > KILLS:
            break
    assert last.status.state == JOB_STATE_SUCCEEDED and last.status.attempt > KILLS, last.status
    assert await scene.sha256(killed) == await scene.sha256(whole)
    assert last.best_test_loss == ended.best_test_loss and last.base_test_loss == ended.base_test_loss
    assert last.best_checkpoint.rsplit("/", 1)[1] == ended.best_checkpoint.rsplit("/", 1)[1]
    # The story has no gap, and of checkpoints and states only what has to stay is left.
    events = await scene.tables.story.read(killed.name, 0, last.last_sequence)
    assert [event.sequence for event in events] == list(range(1, last.last_sequence + 1))
    assert any(event.note.startswith("goes on after step") for event in events)
    for run in (whole, killed):
        found = await scene.tables.checkpoints.all(f"{run.name}/")
        assert [one.name for one in found if one.best] == [f"{run.name}/{ended.best_checkpoint.split('/', 4)[4]}"]
        assert len(found) <= 6
        states = [key async for key in scene.runtime.store.list(f"{run.name}/states/")]
        assert states == [f"{run.name}/states/{SETTINGS['train_steps']}/manifest.json"]
    scene.trainers.kill()
    await _upgraded(scene, await scene.sha256(whole))


async def _nobody_asks(scene: Scene) -> None:
    """Returns once NATS has seen that no trainer is there."""
    queue: Any = scene.runtime.jobs
    async with asyncio.timeout(20):
        while (await queue._connection.js.consumer_info(STREAM, durable(KIND))).num_waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def _upgraded(scene: Scene, expected: str) -> None:
    """A rolling upgrade: each trainer gets a successor, then SIGTERM; the job goes on long before its lease ends."""
    await _nobody_asks(scene)  # else NATS may send the run to the one that was killed
    trainer = scene.trainers.start(LATE, "beside")
    for attempt in range(TRIES):
        drained = await scene.create(f"drained-{attempt}")
        for epoch in (1, 2):
            before = await scene.until(drained, lambda now, epoch=epoch: _is_at(now, epoch, 7 * epoch))
            if is_final(before.status):
                break
            assert lease_left(before.status).total_seconds() > LATE / 2
            successor = scene.trainers.start(LATE, "beside")
            os.kill(trainer, signal.SIGTERM)
            trainer, began = successor, time.monotonic()
            after = await scene.until(drained, lambda now, epoch=epoch: _is_at(now, epoch + 1, 0))
            if is_final(after.status):
                break
            assert after.status.worker != before.status.worker and time.monotonic() - began < LATE / 4
        last = await scene.until(drained, lambda now: is_final(now.status))
        assert last.status.state == JOB_STATE_SUCCEEDED, last.status
        if last.status.epoch == 3:
            break
    assert last.status.epoch == 3, last.status
    assert await scene.sha256(drained) == expected
