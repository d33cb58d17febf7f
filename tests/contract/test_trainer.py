"""The whole trainer in one process: real gRPC, real training of a tiny model, fakes of NATS and the store."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from codegraft.common.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_FAILED,
    JOB_STATE_QUEUED,
    JOB_STATE_RUNNING,
    JOB_STATE_SUCCEEDED,
)
from codegraft.event.v1 import events_pb2
from codegraft.scanner.v1.dataset_pb2 import DatasetManifest, DatasetPart
from codegraft.trainer.v1 import run_pb2 as pb
from codegraft.trainer.v1 import run_pb2_grpc
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters
from services.core import errors
from services.core.events import EventBus
from services.core.models import prompts, weights
from services.core.rpc.interceptors import CallInterceptor
from services.core.rpc.status import from_rpc
from services.core.runtime import Runtime
from services.inference import model as inference_model
from services.inference.adapters import lora, verify
from services.inference.adapters.verify import Base
from services.inference.engine.scheduler import Limits
from services.trainer.assembly import Trainer
from services.trainer.config import TrainerSettings
from tests import published
from tests.unit.inference.tiny import make_model, make_tokenizer

PROJECT = "projects/demo"
DATASET = f"{PROJECT}/datasets/0123456789abcdef"
SOURCE = f"{PROJECT}/sources/one"
QUICK = {
    "learning_rate": 2e-2,
    "train_steps": 12,
    "eval_steps": 4,
    "batch_size": 4,
    "micro_batch_size": 2,
    "context_length": 64,
    "lora_r": 4,
    "early_stopping_patience": 0,
}
ENDLESS = {**QUICK, "train_steps": 1_000_000, "eval_steps": 1_000_000, "checkpoint_steps": 5}


@dataclass
class Scanner:
    """As far as the trainer asks it."""

    newest_dataset: str = DATASET

    async def newest(self, project: str) -> str:
        if not self.newest_dataset:
            raise errors.NoDataset(f"{project} has no dataset", field="dataset")
        return self.newest_dataset


@dataclass
class World:
    """A trainer with everything around it."""

    runtime: Runtime
    scanner: Scanner
    base: Path
    runs: Any
    models: Any
    tables: Any
    stop: Callable[[], Any]
    watched: list[Any] = field(default_factory=list)

    async def create(self, hyperparameters: dict[str, Any], **fields: Any) -> pb.Run:
        values = {"parent": PROJECT, "base_model": f"dir:{self.base}", **fields}
        request = pb.CreateRunRequest(hyperparameters=Hyperparameters(**hyperparameters), **values)
        return (await self.runs.CreateRun(request, timeout=10)).run

    async def watch(self, run: pb.Run, after: int = 0) -> tuple[pb.Run, list[Any]]:
        """Its last state and its story."""
        last, events = run, []
        async for response in self.runs.WatchRun(pb.WatchRunRequest(name=run.name, after_sequence=after), timeout=90):
            last = response.run
            if response.HasField("event"):
                events.append(response.event)
        return last, events

    async def get(self, run: pb.Run) -> pb.Run:
        return (await self.runs.GetRun(pb.GetRunRequest(name=run.name))).run

    async def until(self, run: pb.Run, reached: Callable[[pb.Run], bool]) -> pb.Run:
        deadline = time.monotonic() + 120
        while not reached(now := await self.get(run)):
            assert time.monotonic() < deadline, f"did not happen in time: {now}"
            await asyncio.sleep(0.02)
        return now

    def told(self, type: str) -> list[Any]:
        return [event for event in self.runtime.events.published if event.type == type]  # type: ignore[attr-defined]


async def commit_dataset(runtime: Runtime, folder: Path, name: str = DATASET, test_files: int = 2) -> None:
    """As the scanner does it."""
    counts, files = {}, {}
    for part, count in (("train", 8), ("test", test_files)):
        texts = [f"def add_{n}(left, right):\n    return left + right + {n}\n" * 8 for n in range(count)]
        rows = [
            {
                "path": f"{part}{n}.py",
                "source": SOURCE,
                "language": "Python",
                "text": text,
                "tokens": len(text),
                "loss": 1.5,
            }
            for n, text in enumerate(texts)
        ]
        schema = pa.schema(
            {
                "path": pa.string(),
                "source": pa.string(),
                "language": pa.string(),
                "text": pa.large_string(),
                "tokens": pa.int64(),
                "loss": pa.float64(),
            }
        )
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{part}.parquet")
        files[f"{part}.parquet"] = folder / f"{part}.parquet"
        size = sum(map(len, texts))
        counts[part] = DatasetPart(files=count, bytes=size, tokens=size)
    manifest = DatasetManifest(name=name, digest=hashlib.sha256(name.encode()).hexdigest(), **counts)
    await runtime.artifacts.commit(name, manifest, files)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_tokenizer("<one>", "<two>")
    make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
async def worlds(base: Path, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Starts trainers; several may share one runtime."""
    running: list[Callable[[], Any]] = []
    buses: list[EventBus] = []

    async def make(
        runtime: Runtime | None = None, scanner: Scanner | None = None, workers: int = 1, **changed: Any
    ) -> World:
        if runtime is None:
            runtime = Runtime.memory()
            await commit_dataset(runtime, tmp_path)
        scanner = scanner or Scanner()
        settings = TrainerSettings(
            trainer_model=f"dir:{base}",
            trainer_device="cpu",
            trainer_threads=1,
            trainer_workers=workers,
            cache_dir=tmp_path / "cache",
            **{"trainer_launcher": "thread", **changed},
        )
        trainer = Trainer(runtime, settings, scanner)
        server = grpc.aio.server(interceptors=[CallInterceptor()])
        for add, servicer, _ in trainer.services:
            add(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        tasks = [asyncio.ensure_future(background()) for background in trainer.background]
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        await asyncio.sleep(0.05)
        stopped = False

        async def stop() -> None:
            nonlocal stopped
            if stopped:
                return
            stopped = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await channel.close()
            await server.stop(0)

        running.append(stop)
        runs, models = run_pb2_grpc.RunServiceStub(channel), run_pb2_grpc.ModelServiceStub(channel)
        buses.append(runtime.events)
        return World(runtime, scanner, base, runs, models, trainer.tables, stop)

    yield make
    for stop in running:
        await stop()
    published.check("trainer", buses)


@pytest.fixture
async def world(worlds: Callable[..., Any]) -> World:
    made: World = await worlds()
    return made


async def refused(call: Any) -> errors.CodegraftError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc(caught.value)


# --- a run ---


async def test_a_run_from_creation_to_its_best_checkpoint(world: World) -> None:
    run = await world.create(QUICK, title="first")
    assert run.status.state == JOB_STATE_QUEUED and run.dataset == DATASET
    last, events = await world.watch(run)
    assert last.status.state == JOB_STATE_SUCCEEDED, last.status
    assert [event.sequence for event in events] == list(range(1, last.last_sequence + 1))
    kinds = [event.WhichOneof("event") for event in events]
    order = [kinds.index(kind) for kind in ("state", "plan", "data", "evaluation", "step")]
    assert order == sorted(order) and kinds.count("data") == 1
    evaluations = [event.evaluation for event in events if event.WhichOneof("event") == "evaluation"]
    assert [evaluation.step for evaluation in evaluations] == [0, 4, 8, 12]
    assert evaluations[0].test_loss == last.base_test_loss and list(evaluations[0].source_losses) == [SOURCE]
    lowest = min(evaluations, key=lambda evaluation: evaluation.test_loss)
    assert lowest.test_loss < 0.95 * last.base_test_loss
    assert last.best_checkpoint == f"{run.name}/checkpoints/{lowest.step}"
    assert last.best_test_loss == lowest.test_loss and last.step == 12
    # Last the best version was judged against the base model.
    assert kinds[-1] == "proof"
    proof = next(event.proof for event in events if event.WhichOneof("event") == "proof")
    assert proof == last.proof and proof.checkpoint == last.best_checkpoint
    assert (proof.base.test_loss, proof.adapter.test_loss) == (last.base_test_loss, last.best_test_loss)
    assert proof.base.foreign_loss == evaluations[0].foreign_loss > 0 < proof.adapter.foreign_loss
    assert proof.next_line_places == 12 and "too few to tell" in proof.verdict
    # Replayed from the middle it is the same story.
    assert (await world.watch(run, after=3))[1] == events[3:]
    # Its checkpoints: only the last best one is marked.
    listed = (await world.runs.ListCheckpoints(pb.ListCheckpointsRequest(parent=run.name))).checkpoints
    assert [checkpoint.name for checkpoint in listed if checkpoint.best] == [last.best_checkpoint]
    best = (await world.runs.GetCheckpoint(pb.GetCheckpointRequest(name=f"{run.name}/checkpoints/best"))).checkpoint
    found = (await world.runs.GetBestCheckpoint(pb.GetBestCheckpointRequest(parent=PROJECT))).checkpoint
    assert best == found and best.test_loss == lowest.test_loss
    # Everybody was told.
    told = events_pb2.BestCheckpointChanged.FromString(world.told("codegraft.trainer.checkpoint.best.v1")[-1].data)
    assert (told.checkpoint, told.sha256) == (best.name, best.sha256)
    assert told.test_loss < told.base_test_loss == last.base_test_loss
    assert world.told("codegraft.trainer.run.metric.v1") and world.told("codegraft.trainer.checkpoint.created.v1")
    states = [events_pb2.RunChanged.FromString(e.data).state for e in world.told("codegraft.trainer.run.changed.v1")]
    assert states[-1] == JOB_STATE_SUCCEEDED


@pytest.mark.parametrize("fim_rate", [0.0, 0.5])
async def test_inference_accepts_the_adapter(world: World, base: Path, fim_rate: float) -> None:
    last, events = await world.watch(await world.create({**QUICK, "fim_rate": fim_rate}))
    manifest = await world.runtime.artifacts.manifest(last.best_checkpoint, AdapterManifest)
    folder = await world.runtime.artifacts.fetch(manifest.name, manifest.files)
    model = weights.load_model(base, torch.float32)
    plain = prompts.detect(weights.load_tokenizer(base))
    serving = Base(f"dir:{base}", weights.base_digest(base), plain, lora.adaptable(model), 256)
    verify.check_manifest(manifest, serving)
    taught = prompts.with_sentinels(plain, ["<one>", "<two>"])
    assert verify.prompt_format(manifest, serving) == (taught if fim_rate else plain)
    assert manifest.fim_sentinels == (["<one>", "<two>"] if fim_rate else [])
    (data,) = [event.data for event in events if event.WhichOneof("event") == "data"]
    assert data.documents == 8 and bool(data.fim_pieces) == bool(fim_rate)
    assert data.labels + data.padding == data.rows * QUICK["context_length"]
    assert verify.check_config((folder / verify.CONFIG).read_bytes(), manifest) == 2.0
    pairs = verify.check_tensors(load_file(folder / verify.WEIGHTS), manifest, serving)
    assert any(bool(b.any()) for _, b in pairs.values())
    # And it comes to what the trainer says of it.
    tokenizer = weights.load_tokenizer(base)
    loaded = inference_model.start(model, tokenizer, "tiny", serving.digest, Limits(kv_tokens=512))
    losses = loaded.probe(loaded.prepare(pairs, 2.0, manifest.sha256), manifest.probe.ids)
    loaded.engine.stop()
    verify.check_probe(manifest.name, manifest.probe, losses)
    assert len(losses) == len(manifest.probe.losses) == 7
    assert losses == pytest.approx(list(manifest.probe.losses), rel=0.2), "in float32 here, in bfloat16 there"


async def test_a_run_that_never_beats_the_base_publishes_no_best(world: World) -> None:
    # Where all is float32 the least rate alone changes the loss, by a part in a hundred million.
    still = {"learning_rate": 1e-9, "lora_init_scale": 1e-6}
    last, events = await world.watch(await world.create({**QUICK, **still, "weight_decay": 0.0}))
    assert last.status.state == JOB_STATE_SUCCEEDED and not last.best_checkpoint
    assert not world.told("codegraft.trainer.checkpoint.best.v1")
    lowest = min(event.evaluation.test_loss for event in events if event.evaluation.step)
    figures = f"(test loss {lowest:.4f} at best, of the base model {last.base_test_loss:.4f})"
    assert any("better than the base" in event.note and figures in event.note for event in events)
    assert not last.HasField("proof")
    error = await refused(world.runs.GetCheckpoint(pb.GetCheckpointRequest(name=f"{last.name}/checkpoints/best")))
    assert isinstance(error, errors.CheckpointNotFound)
    error = await refused(world.runs.GetBestCheckpoint(pb.GetBestCheckpointRequest(parent=PROJECT)))
    assert isinstance(error, errors.CheckpointNotFound)


async def test_cancelling_ends_a_run_and_keeps_its_checkpoints(world: World) -> None:
    run = await world.create(ENDLESS)
    await world.until(run, lambda now: now.step >= 5)
    began = time.monotonic()
    await world.runs.CancelRun(pb.CancelRunRequest(name=run.name))
    last, _ = await world.watch(run)
    assert last.status.state == JOB_STATE_CANCELLED and time.monotonic() - began < 10
    assert (await world.runs.ListCheckpoints(pb.ListCheckpointsRequest(parent=run.name))).checkpoints
    again = (await world.runs.CancelRun(pb.CancelRunRequest(name=run.name))).run
    assert again.status.state == JOB_STATE_CANCELLED


async def test_two_processes_train_and_stop_together(worlds: Callable[..., Any]) -> None:
    world: World = await worlds(trainer_launcher="elastic", trainer_processes=2)
    run = await world.create(ENDLESS)
    await world.until(run, lambda now: now.step >= 5)
    began = time.monotonic()
    await world.runs.CancelRun(pb.CancelRunRequest(name=run.name))
    last, events = await world.watch(run)
    assert last.status.state == JOB_STATE_CANCELLED and time.monotonic() - began < 10
    assert [event.sequence for event in events] == list(range(1, last.last_sequence + 1))
    kept = (await world.runs.ListCheckpoints(pb.ListCheckpointsRequest(parent=run.name))).checkpoints
    manifest = await world.runtime.artifacts.manifest(kept[-1].name, AdapterManifest)
    folder = await world.runtime.artifacts.fetch(manifest.name, manifest.files)
    assert kept[-1].step == last.step and load_file(folder / verify.WEIGHTS)


async def test_another_worker_goes_on_where_the_first_one_stopped(worlds: Callable[..., Any]) -> None:
    first: World = await worlds()
    steps = {**QUICK, "train_steps": 80, "eval_steps": 40, "checkpoint_steps": 10, "max_eval_tokens": 256}
    run = await first.create(steps)
    await first.until(run, lambda now: now.step > 10)  # step 10's state is kept by then
    await first.stop()
    second: World = await worlds(first.runtime)
    # A fake's buckets are shared, so the second process sees what the first one left.
    stopped = await second.get(run)
    assert stopped.status.state in (JOB_STATE_QUEUED, JOB_STATE_RUNNING), stopped.status
    last, events = await second.watch(run)
    assert last.status.state == JOB_STATE_SUCCEEDED and last.step == 80
    assert [event.sequence for event in events] == list(range(1, last.last_sequence + 1))
    notes = [event.note for event in events if event.note.startswith("goes on after step")]
    assert len(notes) == 1 and int(notes[0].rsplit(" ", 1)[1]) >= 10
    # One process that is never stopped makes the very same adapter.
    third: World = await worlds()
    whole, _ = await third.watch(await third.create(steps))
    name = f"{whole.name}/checkpoints/80"
    expected = (await third.runs.GetCheckpoint(pb.GetCheckpointRequest(name=name))).checkpoint
    name = f"{run.name}/checkpoints/80"
    found = (await second.runs.GetCheckpoint(pb.GetCheckpointRequest(name=name))).checkpoint
    assert found.sha256 == expected.sha256 and found.test_loss == expected.test_loss
    # Of the states only the last one is kept.
    states = [key async for key in second.runtime.store.list(f"{run.name}/states/")]
    assert states == [f"{run.name}/states/80/manifest.json"]


# --- requests ---


async def test_the_same_request_makes_one_run(worlds: Callable[..., Any]) -> None:
    world: World = await worlds(workers=0)
    one = await world.create(QUICK, request_id="r1")
    assert (await world.create(QUICK, request_id="r1")).name == one.name
    assert (await world.create(QUICK)).name != one.name
    error = await refused(world.create({**QUICK, "lora_r": 8}, request_id="r1"))
    assert isinstance(error, errors.RequestIdReused) and error.field == "request_id"
    world.scanner.newest_dataset = ""  # the project's newest may have moved on meanwhile
    assert (await world.create(QUICK, request_id="r1")).name == one.name


async def test_runs_are_listed_newest_first_and_latest_is_one_of_them(worlds: Callable[..., Any]) -> None:
    world: World = await worlds(workers=0)
    made = []
    for _ in range(3):
        made.append((await world.create(QUICK)).name)
        await asyncio.sleep(0.005)
    page = await world.runs.ListRuns(pb.ListRunsRequest(parent=PROJECT, page_size=2))
    rest = await world.runs.ListRuns(pb.ListRunsRequest(parent=PROJECT, page_token=page.next_page_token))
    assert [run.name for run in [*page.runs, *rest.runs]] == made[::-1] and not rest.next_page_token
    latest = await world.runs.GetRun(pb.GetRunRequest(name=f"{PROJECT}/runs/latest"))
    assert latest.run.name == made[-1]
    everybodys = world.runs.WatchRuns(pb.WatchRunsRequest(parent=PROJECT), timeout=20)
    told = [(await everybodys.read()).run for _ in made]
    assert sorted(run.name for run in told) == sorted(made)
    places = {run.name: run.status.progress.message.partition(" in the ")[0] for run in told}
    assert [places[name] for name in made] == ["waits, 1st", "waits, 2nd", "waits, 3rd"]
    made.append((await world.create(QUICK)).name)
    assert (await everybodys.read()).run.name == made[-1], "somebody began one"
    everybodys.cancel()
    error = await refused(world.runs.WatchRuns(pb.WatchRunsRequest(parent="demo")).read())
    assert isinstance(error, errors.InvalidName) and error.field == "parent"


async def test_a_plan_tells_every_setting_without_training(worlds: Callable[..., Any]) -> None:
    world: World = await worlds(workers=0)
    request = pb.PlanRunRequest(parent=PROJECT, hyperparameters=Hyperparameters(lora_r=8))
    plan = (await world.runs.PlanRun(request)).plan
    assert plan.hyperparameters.lora_r == 8 and plan.base_loss == 1.5
    assert plan.train_tokens > 0 and plan.test_tokens > 0 and plan.estimated_seconds > 0
    assert {setting.name for setting in plan.settings if setting.given} == {"lora_r"}
    assert not (await world.runs.ListRuns(pb.ListRunsRequest(parent=PROJECT))).runs


@pytest.mark.parametrize(
    ("fields", "expected", "at"),
    [
        ({"parent": "demo"}, errors.InvalidName, "parent"),
        ({"base_model": "no-such-model"}, errors.ModelNotFound, "model"),
        ({"dataset": f"{PROJECT}/datasets/ffffffffffffffff"}, errors.DatasetNotFound, "dataset"),
        ({"dataset": "projects/other/datasets/0123456789abcdef"}, errors.InvalidName, "dataset"),
        ({"hyperparameters": {"lora_r": 0}}, errors.InvalidHyperparameter, "hyperparameters.lora_r"),
        ({"hyperparameters": {"context_length": 4096}}, errors.InvalidHyperparameter, "hyperparameters.context_length"),
    ],
)
async def test_a_bad_request_is_refused_with_its_field(
    worlds: Callable[..., Any], fields: dict[str, Any], expected: type[errors.CodegraftError], at: str
) -> None:
    world: World = await worlds(workers=0)
    values = {"parent": PROJECT, "base_model": f"dir:{world.base}", "hyperparameters": QUICK, **fields}
    for call, request in ((world.runs.CreateRun, pb.CreateRunRequest), (world.runs.PlanRun, pb.PlanRunRequest)):
        error = await refused(call(request(**values)))
        assert type(error) is expected and error.field == at and error.hint


async def test_a_project_without_a_dataset_and_one_without_test_files(
    worlds: Callable[..., Any], tmp_path: Path
) -> None:
    world: World = await worlds(scanner=Scanner(""), workers=0)
    assert isinstance(await refused(world.create(QUICK)), errors.NoDataset)
    name = f"{PROJECT}/datasets/aaaaaaaaaaaaaaaa"
    await commit_dataset(world.runtime, tmp_path, name, test_files=0)
    assert isinstance(await refused(world.create(QUICK, dataset=name)), errors.EmptyDataset)


async def test_a_layer_that_the_model_lacks_fails_the_run_with_its_reason(world: World) -> None:
    last, _ = await world.watch(await world.create({**QUICK, "target_modules": ["nothing_proj"]}))
    assert last.status.state == JOB_STATE_FAILED and last.status.attempt == 1
    assert last.status.failure.reason == "INVALID_HYPERPARAMETER" and "q_proj" in last.status.failure.hint


async def test_what_is_not_there(world: World) -> None:
    name = f"{PROJECT}/runs/none"
    for call in (
        world.runs.GetRun(pb.GetRunRequest(name=name)),
        world.runs.GetRun(pb.GetRunRequest(name=f"{PROJECT}/runs/latest")),
        world.runs.CancelRun(pb.CancelRunRequest(name=name)),
        world.runs.ListCheckpoints(pb.ListCheckpointsRequest(parent=name)),
    ):
        assert isinstance(await refused(call), errors.RunNotFound)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.watch(pb.Run(name=name))
    assert isinstance(from_rpc(caught.value), errors.RunNotFound)
    error = await refused(world.runs.ListRuns(pb.ListRunsRequest(parent=PROJECT, page_size=-1)))
    assert isinstance(error, errors.InvalidPageSize)


async def test_models_are_listed(world: World) -> None:
    request = pb.ListModelsRequest(page_size=1)
    first = await world.models.ListModels(request)
    assert first.models[0].id == "smollm2-135m" and first.models[0].lora_targets and first.next_page_token
    everything = await world.models.ListModels(pb.ListModelsRequest())
    assert len(everything.models) > 10 and not everything.next_page_token
