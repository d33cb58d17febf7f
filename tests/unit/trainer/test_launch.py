"""The folder between worker and processes, and the launchers: threads and real torch elastic, stopped and orphaned."""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections import deque
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from codegraft.trainer.v1.training_pb2 import (
    CheckpointWritten,
    StepTrained,
    TrainingEnded,
    TrainingLoaded,
    TrainingMessage,
    TrainingSpec,
)
from services.core import log
from services.core.errors import EmptyDataset, InternalError, InvalidHyperparameter, JobCancelled
from services.trainer import checkpoint
from services.trainer.launch.elastic import ElasticLauncher, relay
from services.trainer.launch.folder import RunFolder
from services.trainer.launch.launcher import Processes, Steps, follow
from services.trainer.launch.thread import ThreadLauncher
from tests.unit.trainer.folders import checkpoints_of, prepared, running_ranks, steps_of


def step(number: int) -> TrainingMessage:
    return TrainingMessage(step=StepTrained(step=number, train_loss=1 / 3))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.prepare(TrainingSpec(run="projects/p/runs/r"))
    return made


# --- the folder ---


def test_messages_are_read_whole_and_once(folder: RunFolder) -> None:
    assert folder.read() == ([], 0)
    folder.write(step(1))
    first, offset = folder.read()
    folder.write(step(2))
    assert first == [step(1)] and folder.read(offset)[0] == [step(2)]
    assert folder.spec().run == "projects/p/runs/r"


@pytest.mark.parametrize("kept", [1, 3, 4, 9])
def test_a_message_whose_writer_was_killed_is_none(folder: RunFolder, kept: int) -> None:
    folder.write(step(1))
    file = folder.path / "messages.binpb"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:kept])
    told, offset = folder.read()
    assert told == [step(1)] and folder.read(offset) == ([], offset)
    assert folder.open_messages() == [step(1)]  # the next group begins
    folder.write(step(2))
    assert folder.read(offset)[0] == [step(2)]


def test_the_first_failure_counts_and_keeps_its_type(folder: RunFolder) -> None:
    assert folder.failure() is None
    folder.fail(InvalidHyperparameter("too large", field="hyperparameters.lora_r", hint="Use less."))
    folder.fail(InternalError("the other rank is gone"))
    found = folder.failure()
    assert isinstance(found, InvalidHyperparameter)
    assert (found.message, found.field, found.hint) == ("too large", "hyperparameters.lora_r", "Use less.")


def test_releasing_makes_room_and_keeps_the_newest_state(folder: RunFolder) -> None:
    for number in (10, 20):
        folder.adapter_path(number).mkdir(parents=True)
        folder.state_path(number).mkdir(parents=True)
    assert folder.waiting() == 2
    for number in (10, 20):
        folder.release(CheckpointWritten(step=number, adapter_path=str(folder.adapter_path(number))))
        assert folder.state_path(number).exists()
    assert folder.waiting() == 0 and not folder.state_path(10).exists()


def test_what_is_told_again_is_recognised_by_its_step() -> None:
    steps = Steps()
    kept = TrainingMessage(checkpoint=CheckpointWritten(step=2))
    story = [TrainingMessage(loaded=TrainingLoaded()), step(1), step(2), kept, step(3)]
    assert all(steps.is_new(message) for message in story)
    assert [steps.is_new(m) for m in [story[0], step(2), kept, step(3), step(4)]] == [True, *[False] * 3, True]


async def test_nothing_is_lost_that_was_written_last(folder: RunFolder) -> None:
    for number in range(3):
        folder.write(step(number))
    with pytest.raises(InternalError, match="without a result: exit code 9"):
        async for message in follow(folder, lambda: True, lambda: "exit code 9"):
            assert message.step.step in range(3)
    folder.write(TrainingMessage(ended=TrainingEnded(step=2)))
    assert len([message async for message in follow(folder, lambda: False, str)]) == 4


# --- a thread ---


async def told(training: Processes, folder: RunFolder, stop_at: int = -1) -> list[TrainingMessage]:
    """The story of a run whose checkpoints are taken at once."""
    found = []
    async for message in training.events():
        found.append(message)
        if message.HasField("checkpoint"):
            folder.release(message.checkpoint)
        if message.HasField("step") and message.step.step == stop_at:
            training.stop()
    return found


async def test_stopping_leaves_a_checkpoint_from_which_another_attempt_goes_on(base: Path, tmp_path: Path) -> None:
    whole = prepared(tmp_path / "whole", base)
    story = await told(ThreadLauncher().start(whole), whole)
    assert [number for number, _ in steps_of(story)] == list(range(1, 31)) and story[-1].ended.why == "all steps done"
    first = prepared(tmp_path / "first", base)
    training = ThreadLauncher().start(first)
    before: list[TrainingMessage] = []
    began = float("inf")
    with pytest.raises(JobCancelled):
        async for message in training.events():
            before.append(message)
            if message.HasField("step") and message.step.step == 3:
                training.stop()
                began = time.monotonic()
    assert time.monotonic() - began < 10
    last = before[-1].checkpoint
    assert 3 <= last.step == steps_of(before)[-1][0] < 30 and first.waiting() == 1
    assert not last.HasField("test_loss") and not last.best
    # The next attempt gets plan and state, as the worker keeps them.
    second = prepared(tmp_path / "second", base)
    spec = second.spec()
    spec.resume_path = last.state_path
    spec.plan.CopyFrom(story[0].loaded.plan)
    second.prepare(spec)
    after = await told(ThreadLauncher().start(second), second)
    assert after[0].loaded.step == last.step and steps_of(after) == steps_of(story)[last.step :]
    assert checkpoints_of(after)[-1] == checkpoints_of(story)[-1]
    # The same state in other files: whoever deletes one attempt's by their content leaves the other's.
    for name in (checkpoint.STATE_TENSORS, checkpoint.STATE_NUMBERS):
        one, other = ((each.state_path(30) / name).read_bytes() for each in (whole, second))
        assert one != other, name
    tensors, again = (load_file(each.state_path(30) / checkpoint.STATE_TENSORS) for each in (whole, second))
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[name], again[name]) for name in tensors)


async def test_training_waits_while_checkpoints_do(base: Path, tmp_path: Path) -> None:
    folder = prepared(tmp_path / "run", base, checkpoint_steps=1)
    training = ThreadLauncher().start(folder)
    events = training.events()
    async for message in events:
        if message.HasField("checkpoint") and message.checkpoint.step == 3:
            break

    def reached() -> int:
        return max(message.step.step for message in folder.read()[0])

    async with asyncio.timeout(20):
        while reached() < 4:  # noqa: ASYNC110  # a thread's
            await asyncio.sleep(0.02)
    await asyncio.sleep(0.3)
    assert folder.waiting() == 3 and reached() == 4
    await training.fence()


async def test_errors_come_as_what_they_are(base: Path, tmp_path: Path, caplog: Any) -> None:
    folder = prepared(tmp_path / "run", base, target_modules=["nothing_proj"])
    with pytest.raises(InvalidHyperparameter) as caught:
        await told(ThreadLauncher().start(folder), folder)
    assert caught.value.field == "hyperparameters.target_modules"
    empty = prepared(tmp_path / "empty", base)
    (tmp_path / "empty" / "train.parquet").unlink()
    with pytest.raises(InternalError, match="FileNotFoundError"), caplog.at_level(logging.CRITICAL):
        await told(ThreadLauncher().start(empty), empty)
    assert not isinstance(folder.failure(), EmptyDataset)


# --- torch elastic ---


async def test_processes_end_with_the_service(base: Path, tmp_path: Path) -> None:
    folder = prepared(tmp_path / "run", base, train_steps=100_000)
    training = ElasticLauncher(1).start(folder)
    deadline = time.monotonic() + 60
    while not (started := running_ranks()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    agent = training._agent  # type: ignore[attr-defined]
    agent.stdin.close()  # as the kernel does it when the service is killed
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive
    with pytest.raises(InternalError, match="without a result"):
        await told(training, folder)
    await training.fence()


def test_what_processes_write_is_logged_and_kept(capsys: Any) -> None:
    log.hide("hunter2hunter2")
    line = b'{"event": "trained", "level": "info"}'
    said: deque[str] = deque(maxlen=2)
    relay(io.BytesIO(line + b"\n{not json}\nkey is hunter2hunter2\nKilled"), said)
    assert line.decode() in capsys.readouterr().err.splitlines()
    assert list(said) == [f"key is {log.REDACTED}", "Killed"]
