"""The life of a run, over the real trainer with fakes of NATS and the store: pause, resume, continue, keep, fail."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from codegraft.common.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_FAILED,
    JOB_STATE_PAUSED,
    JOB_STATE_QUEUED,
    JOB_STATE_SUCCEEDED,
)
from codegraft.trainer.v1 import run_pb2 as pb
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from codegraft.trainer.v1.training_pb2 import TrainingMessage
from services.core import errors
from services.trainer.launch.folder import RunFolder
from services.trainer.model import lora
from services.trainer.run.resume import States
from tests.contract import test_trainer
from tests.contract.storage_limit import limit_storage
from tests.contract.test_trainer import (
    DATASET,
    PROJECT,
    World,
    base,
    commit_dataset,
    refused,
    world,
    worlds,
)

__all__ = ["base", "world", "worlds"]  # fixtures
QUICK = {**test_trainer.QUICK, "max_eval_tokens": 256}
ENDLESS = {**test_trainer.ENDLESS, "max_eval_tokens": 256}
STEADY = {**QUICK, "train_steps": 20, "eval_steps": 10, "checkpoint_steps": 20, "lora_dropout": 0.1}


@dataclass
class Halt:
    """Where training stands still until it is asked to stop: however late that is, the run has not ended."""

    step: float = math.inf


@pytest.fixture
def halt(monkeypatch: pytest.MonkeyPatch) -> Halt:
    made, write = Halt(), RunFolder.write

    def writes(folder: RunFolder, message: TrainingMessage) -> None:
        write(folder, message)
        while message.step.step >= made.step and not folder.is_stopped():
            time.sleep(0.005)

    monkeypatch.setattr(RunFolder, "write", writes)
    return made


async def sha256_of(world: World, run: pb.Run, step: int) -> str:
    name = f"{run.name}/checkpoints/{step}"
    found: pb.GetCheckpointResponse = await world.runs.GetCheckpoint(pb.GetCheckpointRequest(name=name))
    return found.checkpoint.sha256


async def steps_of(world: World, run: pb.Run) -> list[int]:
    listed = await world.runs.ListCheckpoints(pb.ListCheckpointsRequest(parent=run.name))
    return [checkpoint.step for checkpoint in listed.checkpoints]


async def pause(world: World, run: pb.Run) -> pb.Run:
    await world.runs.PauseRun(pb.PauseRunRequest(name=run.name))
    return await world.until(run, lambda now: now.status.state == JOB_STATE_PAUSED)


# --- pause and resume ---


async def test_a_paused_run_frees_its_device_and_ends_as_if_it_had_never_been(world: World, halt: Halt) -> None:
    whole, _ = await world.watch(await world.create(STEADY))
    halt.step = 2
    run = await world.create(STEADY)
    for reached, following in ((2, 11), (11, math.inf)):
        await world.until(run, lambda now, reached=reached: now.status.progress.done >= reached)  # type: ignore[misc]
        paused = await pause(world, run)
        halt.step = math.inf
        assert not paused.status.worker and not paused.status.pause_requested
        other, _ = await world.watch(
            await world.create({**QUICK, "train_steps": 2, "eval_steps": 2})
        )  # by the only worker
        assert other.status.state == JOB_STATE_SUCCEEDED
        again = (await world.runs.PauseRun(pb.PauseRunRequest(name=run.name))).run
        assert again.status.state == JOB_STATE_PAUSED
        halt.step = following
        resumed = (await world.runs.ResumeRun(pb.ResumeRunRequest(name=run.name))).run
        assert resumed.status.state == JOB_STATE_QUEUED
    last, events = await world.watch(run)
    assert last.status.state == JOB_STATE_SUCCEEDED and last.status.attempt == 1
    assert await sha256_of(world, run, 20) == await sha256_of(world, whole, 20)
    assert last.best_test_loss == whole.best_test_loss
    notes = [event.note for event in events if event.note]
    assert sum("pause was asked for" in note for note in notes) == 2
    assert sum(note.startswith("goes on after step") for note in notes) == 2
    for call, request in ((world.runs.PauseRun, pb.PauseRunRequest), (world.runs.ResumeRun, pb.ResumeRunRequest)):
        assert isinstance(await refused(call(request(name=run.name))), errors.InvalidTransition)
        assert isinstance(await refused(call(request(name=f"{PROJECT}/runs/none"))), errors.RunNotFound)
        assert isinstance(await refused(call(request(name="none"))), errors.InvalidName)


async def test_runs_that_wait_know_their_place_and_can_be_paused_and_cancelled(worlds: Callable[..., Any]) -> None:
    world: World = await worlds(workers=0)
    runs = []
    for _ in range(3):
        runs.append(await world.create(QUICK))
        await asyncio.sleep(0.002)
    assert (await world.get(runs[2])).status.progress.message == "waits, 3rd in the queue"
    assert (await pause(world, runs[0])).status.state == JOB_STATE_PAUSED
    assert (await world.get(runs[2])).status.progress.message == "waits, 2nd in the queue"
    cancelled = (await world.runs.CancelRun(pb.CancelRunRequest(name=runs[0].name))).run
    assert cancelled.status.state == JOB_STATE_CANCELLED
    untouched = (await world.runs.ResumeRun(pb.ResumeRunRequest(name=runs[1].name))).run
    assert untouched.status.state == JOB_STATE_QUEUED


# --- which checkpoints stay ---


async def test_old_checkpoints_go_but_for_the_best_and_the_kept(world: World) -> None:
    settings = {**ENDLESS, "eval_steps": 8, "checkpoint_steps": 3, "keep_checkpoints": 1, "learning_rate": 1e-2}
    run = await world.create(settings)
    await world.until(run, lambda now: now.status.progress.done >= 3)
    await pause(world, run)
    chosen = (await steps_of(world, run))[0]
    name = f"{run.name}/checkpoints/{chosen}"
    kept = (await world.runs.KeepCheckpoint(pb.KeepCheckpointRequest(name=name, kept=True))).checkpoint
    assert kept.kept
    await world.runs.ResumeRun(pb.ResumeRunRequest(name=run.name))
    await world.until(run, lambda now: now.step >= 20)
    paused = await pause(world, run)
    steps = await steps_of(world, run)
    best = int(paused.best_checkpoint.rsplit("/", 1)[1])
    # And the best before, the last, and one more.
    assert {chosen, best} <= set(steps) and len(steps) <= 5, steps
    manifests = [key async for key in world.runtime.store.list(f"{run.name}/checkpoints/")]
    assert sorted(manifests) == sorted(f"{run.name}/checkpoints/{step}/manifest.json" for step in steps)
    _, events = await first_events(world, run, paused.last_sequence)
    assert any(event.note.startswith("deleted the checkpoint of step ") for event in events)
    released = (await world.runs.KeepCheckpoint(pb.KeepCheckpointRequest(name=name, kept=False))).checkpoint
    assert not released.kept
    hold = pb.KeepCheckpointRequest(name=name, hold_seconds=3600)
    held = (await world.runs.KeepCheckpoint(hold)).checkpoint
    until = held.hold_expire_time.ToDatetime(tzinfo=UTC) - datetime.now(UTC)
    assert not held.kept and timedelta(minutes=59) < until <= timedelta(hours=1)
    hold.hold_seconds = 10
    assert (await world.runs.KeepCheckpoint(hold)).checkpoint == held, "the longer one counts"
    for hold.hold_seconds in (-1, 31 * 86400):
        error = await refused(world.runs.KeepCheckpoint(hold))
        assert isinstance(error, errors.InvalidArgument) and error.field == "hold_seconds" and error.hint
    error = await refused(world.runs.KeepCheckpoint(pb.KeepCheckpointRequest(name=f"{run.name}/checkpoints/999")))
    assert isinstance(error, errors.CheckpointNotFound)


async def first_events(world: World, run: pb.Run, count: int) -> tuple[pb.Run, list[Any]]:
    """The story so far of a run that has not ended."""
    last, events = run, []
    async for response in world.runs.WatchRun(pb.WatchRunRequest(name=run.name), timeout=30):
        last = response.run
        events.append(response.event)
        if len(events) == count:
            break
    return last, events


# --- from an earlier adapter ---


async def test_a_run_goes_on_from_an_earlier_adapter_on_another_dataset(world: World, tmp_path: Path) -> None:
    first, _ = await world.watch(await world.create(QUICK))
    other = f"{PROJECT}/datasets/bbbbbbbbbbbbbbbb"
    await commit_dataset(world.runtime, tmp_path, other, test_files=1)
    again = {key: value for key, value in QUICK.items() if key != "lora_r"}
    run = await world.create(
        again, dataset=other, base_model="", initial_checkpoint=f"{first.name}/checkpoints/best", request_id="once"
    )
    assert run.initial_checkpoint == first.best_checkpoint and run.base_model == first.base_model
    last, events = await world.watch(run)
    assert last.status.state == JOB_STATE_SUCCEEDED, last.status
    told = {setting.name: setting for setting in last.plan.settings}
    assert (told["lora_r"].value, told["lora_r"].given) == ("4", False) and "checkpoint" in told["lora_r"].why
    evaluations = [event.evaluation for event in events if event.WhichOneof("event") == "evaluation"]
    note = next(event.note for event in events if event.note.startswith("the adapter it starts from"))
    start = float(note.split("test loss of ")[1].split(",")[0])
    assert evaluations[0].step == 0 and start < 0.95 * evaluations[0].test_loss == 0.95 * last.base_test_loss
    if last.best_checkpoint:
        assert last.best_test_loss < start
    kept = (await world.runs.GetCheckpoint(pb.GetCheckpointRequest(name=first.best_checkpoint))).checkpoint
    assert kept.kept, "the run may need it again"
    repeated = await world.create(
        again, dataset=other, base_model="", initial_checkpoint=f"{first.name}/checkpoints/best", request_id="once"
    )
    assert repeated.name == run.name


@pytest.mark.parametrize(
    ("fields", "expected", "at"),
    [
        ({"initial_checkpoint": "none"}, errors.InvalidName, "initial_checkpoint"),
        ({"initial_checkpoint": f"{PROJECT}/runs/r/checkpoints/7"}, errors.CheckpointNotFound, "name"),
        ({"initial_checkpoint": f"{PROJECT}/runs/none/checkpoints/best"}, errors.RunNotFound, "name"),
        ({"base_model": "smollm2-135m"}, errors.BaseModelMismatch, "initial_checkpoint"),
        ({"hyperparameters": {"lora_r": 8}}, errors.InvalidHyperparameter, "hyperparameters.lora_r"),
        ({"parent": "projects/other"}, errors.InvalidName, "initial_checkpoint"),
    ],
)
async def test_what_cannot_go_on_is_refused_with_its_field(
    worlds: Callable[..., Any], fields: dict[str, Any], expected: type[errors.CodegraftError], at: str, tmp_path: Path
) -> None:
    world: World = await worlds(workers=0)
    await commit_dataset(world.runtime, tmp_path, "projects/other/datasets/0123456789abcdef")
    world.scanner.newest_dataset = DATASET
    if "parent" in fields:
        world.scanner.newest_dataset = "projects/other/datasets/0123456789abcdef"
    name = f"{PROJECT}/runs/r/checkpoints/3"
    model = f"dir:{world.base}"
    await world.tables.checkpoints.create(pb_checkpoint(name, model))
    manifest = pb_manifest(name, model)
    await world.runtime.artifacts.commit(name, manifest, {"adapter_model.safetensors": b"x"})
    values = {"parent": PROJECT, "initial_checkpoint": name, "hyperparameters": {}, **fields}
    error = await refused(world.runs.CreateRun(pb.CreateRunRequest(**values)))
    assert type(error) is expected and error.field == at


def pb_checkpoint(name: str, model: str) -> Any:
    from codegraft.trainer.v1.checkpoint_pb2 import Checkpoint

    return Checkpoint(name=name, step=3, base_model=model)


def pb_manifest(name: str, model: str) -> Any:
    from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest

    return AdapterManifest(name=name, base_model=model, lora_r=4, lora_alpha=8, base_digest="0" * 64)


async def test_an_adapter_of_other_weights_fails_the_run(worlds: Callable[..., Any]) -> None:
    world: World = await worlds()
    name = f"{PROJECT}/runs/r/checkpoints/3"
    await world.tables.checkpoints.create(pb_checkpoint(name, f"dir:{world.base}"))
    await world.runtime.artifacts.commit(
        name, pb_manifest(name, f"dir:{world.base}"), {"adapter_model.safetensors": b"x"}
    )
    last, _ = await world.watch(await world.create({}, initial_checkpoint=name))
    assert last.status.state == JOB_STATE_FAILED and last.status.attempt == 1
    assert last.status.failure.reason == "BASE_MODEL_MISMATCH"


# --- failures of the caller's making ---


async def fails(world: World, hyperparameters: dict[str, Any] = QUICK) -> pb.Run:
    last, _ = await world.watch(await world.create(hyperparameters))
    assert last.status.state == JOB_STATE_FAILED, last.status
    assert last.status.attempt == 1 and last.status.failure.hint, "the same attempt would fail again"
    return last


async def test_a_run_that_diverges_keeps_its_last_good_checkpoint(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulate, calls = lora.Trainee.accumulate, []

    def breaks(trainee: Any, rows: Any, tokens: int) -> float:
        calls.append(1)
        loss = accumulate(trainee, rows, tokens)
        return float("nan") if len(calls) > 24 else loss

    monkeypatch.setattr(lora.Trainee, "accumulate", breaks)
    last = await fails(world, {**ENDLESS, "keep_checkpoints": 0})
    assert last.status.failure.reason == "TRAINING_DIVERGED" and "learning rate" in last.status.failure.hint
    assert await steps_of(world, last)


async def test_a_run_that_does_not_fit_in_memory_says_so_before_its_first_step(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = [1]

    def short(trainee: Any, rows: Any, tokens: int) -> float:
        if len(rows) > room[0]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return float(accumulate(trainee, rows, tokens))

    accumulate = lora.Trainee.accumulate
    monkeypatch.setattr(lora.Trainee, "accumulate", short)
    last, _ = await world.watch(await world.create(QUICK))
    told = {setting.name: setting for setting in last.plan.settings}
    assert last.status.state == JOB_STATE_SUCCEEDED and last.plan.hyperparameters.micro_batch_size == 1
    assert told["micro_batch_size"].why == "2 rows did not fit in memory" and not told["micro_batch_size"].given
    room[0] = 0
    last = await fails(world)
    assert last.status.failure.reason == "OUT_OF_MEMORY" and not last.step


async def test_a_run_goes_on_where_there_is_less_memory(
    world: World, halt: Halt, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**QUICK, "learning_rate": 4e-3, "train_steps": 12, "eval_steps": 12, "lora_dropout": 0.0}
    whole, _ = await world.watch(await world.create(settings))
    accumulate, is_short, trained = lora.Trainee.accumulate, False, set()

    def on_another_machine(trainee: Any, rows: Any, tokens: int) -> float:
        in_low_memory_mode = trainee._arena is None
        if is_short and (len(rows) > 1 or not in_low_memory_mode):
            raise torch.OutOfMemoryError("CUDA out of memory")
        trained.add((len(rows), in_low_memory_mode))
        return float(accumulate(trainee, rows, tokens))

    monkeypatch.setattr(lora.Trainee, "accumulate", on_another_machine)
    halt.step = 2
    run = await world.create(settings)
    await world.until(run, lambda now: now.status.progress.done >= 2)
    planned = (await pause(world, run)).plan
    halt.step = math.inf
    is_short = True
    trained.clear()
    await world.runs.ResumeRun(pb.ResumeRunRequest(name=run.name))
    last, events = await world.watch(run)
    assert last.status.state == JOB_STATE_SUCCEEDED and trained == {(1, True)}, last.status
    told = next(event.note for event in events if event.note.startswith("there is less memory"))
    assert "trains with 1 row at once instead of 2 and low memory mode" in told and "dropout" not in told
    assert last.plan == planned, "another attempt may have the memory again"
    manifest = await world.runtime.artifacts.manifest(f"{run.name}/checkpoints/12", AdapterManifest)
    assert manifest.hyperparameters.low_gpu_memory_mode and manifest.hyperparameters.micro_batch_size == 1
    gain = whole.base_test_loss - whole.test_loss
    assert gain > 0.1 and last.test_loss == pytest.approx(whole.test_loss, abs=0.15 * gain)  # in bf16


async def test_a_dataset_or_a_model_that_is_gone_fails_the_run(worlds: Callable[..., Any], tmp_path: Path) -> None:
    queue: World = await worlds(workers=0)
    gone = await queue.create(QUICK)
    await queue.runtime.store.delete(f"{DATASET}/manifest.json")
    name = f"{PROJECT}/datasets/cccccccccccccccc"
    await commit_dataset(queue.runtime, tmp_path, name)
    elsewhere = await queue.create(QUICK, dataset=name)

    def move(run: pb.Run) -> None:
        run.base_model = f"dir:{tmp_path / 'moved'}"

    await queue.tables.runs.mutate(elsewhere.name, move)
    world: World = await worlds(queue.runtime)
    for run, reason in ((gone, "DATASET_NOT_FOUND"), (elsewhere, "MODEL_NOT_FOUND")):
        last, _ = await world.watch(run)
        assert (last.status.state, last.status.attempt) == (JOB_STATE_FAILED, 1)
        assert last.status.failure.reason == reason


# --- cancelling ---


async def test_cancelling_while_the_model_is_loaded_ends_the_run_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulate, stop, asked = lora.Trainee.accumulate, RunFolder.stop, threading.Event()

    def waits(trainee: Any, rows: Any, tokens: int) -> float:
        asked.wait(20)
        return float(accumulate(trainee, rows, tokens))

    def tells(folder: RunFolder) -> None:
        stop(folder)
        asked.set()

    monkeypatch.setattr(lora.Trainee, "accumulate", waits)
    monkeypatch.setattr(RunFolder, "stop", tells)
    run = await world.create(QUICK)
    await world.until(run, lambda now: now.status.progress.message == "loading the model")
    began = time.monotonic()
    await world.runs.CancelRun(pb.CancelRunRequest(name=run.name))
    last, _ = await world.watch(run)
    assert last.status.state == JOB_STATE_CANCELLED and time.monotonic() - began < 8
    assert not last.HasField("plan")


async def test_before_the_first_step_there_is_an_adapter_to_go_on_from(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = await world.watch(await world.create(QUICK))
    losses, may_evaluate = lora.Trainee.losses, threading.Event()

    def waits(trainee: Any, rows: Any) -> Any:
        may_evaluate.wait(0.3)  # once a batch, so that there is time to ask for something meanwhile
        return losses(trainee, rows)

    monkeypatch.setattr(lora.Trainee, "losses", waits)
    paused, cancelled = await world.create(QUICK), await world.create(QUICK)
    await world.until(paused, lambda now: now.status.progress.message == "evaluating the base model")
    assert not (await pause(world, paused)).best_checkpoint and await steps_of(world, paused) == [0]
    await world.until(cancelled, lambda now: now.status.progress.message == "evaluating the base model")
    began = time.monotonic()
    await world.runs.CancelRun(pb.CancelRunRequest(name=cancelled.name))
    last, _ = await world.watch(cancelled)
    assert last.status.state == JOB_STATE_CANCELLED and not last.best_checkpoint and time.monotonic() - began < 10
    (left,) = (await world.runs.ListCheckpoints(pb.ListCheckpointsRequest(parent=cancelled.name))).checkpoints
    assert (left.step, left.best, left.HasField("test_loss")) == (0, False, False)
    may_evaluate.set()
    await world.runs.ResumeRun(pb.ResumeRunRequest(name=paused.name))
    resumed, _ = await world.watch(paused)
    assert resumed.status.state == JOB_STATE_SUCCEEDED
    assert await sha256_of(world, resumed, 12) == await sha256_of(world, whole, 12)
    continued, _ = await world.watch(
        await world.create({"train_steps": 2, "eval_steps": 2}, base_model="", initial_checkpoint=left.name)
    )
    assert continued.status.state == JOB_STATE_SUCCEEDED, continued.status


async def test_a_run_ends_where_its_project_is_full_and_its_last_checkpoint_stays(world: World) -> None:
    run = await world.create(ENDLESS)
    await world.until(run, lambda now: now.step >= 6)
    await limit_storage(world.runtime, PROJECT, await world.runtime.storage.used(PROJECT))
    last, _ = await world.watch(run)
    assert last.status.state == JOB_STATE_FAILED and last.status.failure.reason == "QUOTA_EXCEEDED"
    assert "bytes of storage, and uses" in last.status.failure.message and last.status.attempt == 1
    assert not world.runtime.jobs.dead, "nobody has to look at it"  # type: ignore[attr-defined]
    listed = (await world.runs.ListCheckpoints(pb.ListCheckpointsRequest(parent=run.name))).checkpoints
    manifest = await world.runtime.artifacts.manifest(listed[-1].name, AdapterManifest)
    await world.runtime.artifacts.fetch(manifest.name, manifest.files)
    assert await States(world.runtime, run.name).newest() is not None
    # Nobody begins another one, until there is room.
    assert (await refused(world.create(QUICK))).reason == "QUOTA_EXCEEDED"
    await limit_storage(world.runtime, PROJECT, None)
    following, _ = await world.watch(await world.create({**QUICK, "train_steps": 4}, initial_checkpoint=manifest.name))
    assert following.status.state == JOB_STATE_SUCCEEDED, following.status
