"""The four services in one process, over a real NATS server and real gRPC: one trace leads through all of them, and the
figures say what happened. The model is tiny and random, the object store a fake."""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
import time
import zipfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from codegraft.common.v1.job_pb2 import JOB_STATE_SUCCEEDED
from codegraft.scanner.v1 import scan_pb2_grpc
from codegraft.scanner.v1.dataset_pb2 import Dataset
from codegraft.scanner.v1.scan_pb2 import Scan, ScanSettings
from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters
from services.client import Addresses, AsyncCodegraft
from services.core import errors
from services.core.audit.log import MemoryAudit
from services.core.events.nats import NatsBus
from services.core.jobs import JobRunner
from services.core.jobs.announcer import announce
from services.core.jobs.nats import NatsQueue
from services.core.jobs.parts import PartRunner
from services.core.models import catalogue
from services.core.nats_connection import connect
from services.core.quota.jobs import places
from services.core.quota.limits import Kind
from services.core.rpc.client import channel
from services.core.rpc.interceptors import CallInterceptor
from services.core.rpc.server import Registration
from services.core.runtime import Runtime
from services.core.state import Table
from services.core.state.nats import NatsState
from services.core.store import MemoryStore
from services.core.telemetry import metrics, tracing
from services.inference import model as inference_model
from services.inference.assembly import Replica
from services.inference.config import InferenceSettings
from services.inference.engine.scheduler import Limits
from services.inference.peers import IngestProjects, TrainerBests
from services.ingest.assembly import Ingest
from services.ingest.config import IngestSettings
from services.scanner import __main__ as scanner
from services.scanner import part_worker
from services.scanner.config import ScannerSettings
from services.scanner.part_worker import PartWorker
from services.scanner.servicer import KIND, ScanServicer
from services.scanner.worker import ScanWorker
from services.trainer.assembly import Trainer
from services.trainer.config import TrainerSettings
from services.trainer.datasets import ScannerDatasets
from tests.conftest import NatsServer
from tests.spans import Recorder, recording
from tests.unit.inference import tiny

TRACE, CALLER = "5a" * 16, "c0" * 8
ADDRESSES = Addresses(*(f"unix:{name}" for name in ("ingest", "scanner", "trainer", "inference")))
QUICK = Hyperparameters(
    learning_rate=5e-3, train_steps=8, eval_steps=8, batch_size=2, micro_batch_size=2, context_length=64, lora_r=4
)
LIMITS = Limits(running=4, waiting=4, step_tokens=64, kv_tokens=4096)


@pytest.fixture
async def runtime(own_nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Runtime]:
    connection = await connect(own_nats_server.url, user=own_nats_server.user, password=own_nats_server.password)

    async def check() -> None:
        return None

    yield Runtime(
        state=lambda bucket, bounds: NatsState(connection, bucket, bounds),
        jobs=NatsQueue(connection),
        events=NatsBus(connection, "codegraft/tests"),
        audit=MemoryAudit(),
        store=MemoryStore(),
        cache_dir=tmp_path / "cache",
        check=check,
    )
    await connection.close()


@pytest.fixture
def recorder() -> Any:
    with recording() as found:
        yield found


@pytest.fixture
def base(tmp_path: Path) -> str:
    torch.set_num_threads(1)
    tokenizer = tiny.make_tokenizer()
    tiny.make_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return f"dir:{tmp_path / 'base'}"


@contextlib.asynccontextmanager
async def serving(services: Sequence[Registration], address: str, *background: Any) -> AsyncIterator[None]:
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    for add, servicer, _ in services:
        add(servicer, server)
    server.add_insecure_port(address)
    await server.start()
    running = [asyncio.create_task(work) for work in background]
    try:
        yield
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await server.stop(0)


@contextlib.asynccontextmanager
async def house(runtime: Runtime, base: str, cache: Path) -> AsyncIterator[Replica]:
    """The four services, each on a socket of its own."""
    ingest = Ingest(runtime, IngestSettings(cache_dir=cache))
    scanning = ScannerSettings(scanner_model=base, scanner_threads=1, scanner_device="cpu", cache_dir=cache)
    state = runtime.state("scanner")
    scans = Table(state, Scan, missing=errors.ScanNotFound)
    datasets = Table(state, Dataset, missing=errors.DatasetNotFound)
    room = places(runtime.quotas, Kind.SCANS, state, scans)
    servicer = ScanServicer(runtime, scanning, scans, datasets, room)
    scan = (scan_pb2_grpc.add_ScanServiceServicer_to_server, servicer, scanner.SERVICE)
    worker, maker = ScanWorker(runtime, scanning, scans, datasets), PartWorker(runtime, scanning, scans)
    training = TrainerSettings(trainer_model=base, trainer_launcher="thread", trainer_threads=1, cache_dir=cache)
    trainer = Trainer(runtime, training, ScannerDatasets(channel(ADDRESSES.scanner)))
    spec = catalogue.find(base)
    replica = Replica(
        runtime,
        InferenceSettings(inference_model=base, cache_dir=cache, metrics_namespace="ml"),
        spec,
        bests=TrainerBests(channel(ADDRESSES.trainer)),
        projects=IngestProjects(channel(ADDRESSES.ingest)),
        load=lambda: inference_model.load(spec, cache, LIMITS, threads=1, kind="auto"),
    )
    async with (
        serving(ingest.services, ADDRESSES.ingest, ingest.fetcher.run()),
        serving(
            [scan],
            ADDRESSES.scanner,
            JobRunner(KIND, scans, runtime.jobs, worker.handle, worker_id="w").run(),
            PartRunner(part_worker.KIND, runtime.store, runtime.jobs, maker.make).run(),
            announce(KIND, scans, runtime.events, scanner.CHANGED, scanner._changed),
        ),
        serving(trainer.services, ADDRESSES.trainer, *(make() for make in trainer.background)),
        serving(replica.services, ADDRESSES.inference, replica.run()),
    ):
        try:
            yield replica
        finally:
            replica.stop()


def archive() -> bytes:
    data, rng = io.BytesIO(), random.Random(1)
    with zipfile.ZipFile(data, "w") as made:
        for number in range(16):
            names = [f"{rng.choice('abcdefgh')}_{rng.randrange(10_000)}" for _ in range(8)]
            made.writestr(f"m{number}.py", "".join(f"def {name}(value):\n    return value + 1\n" for name in names))
    return data.getvalue()


async def through_the_house(client: AsyncCodegraft, replica: Replica, folder: Path) -> str:
    """From a source to the new adapter; the best checkpoint's SHA-256."""
    (folder / "code.zip").write_bytes(archive())
    added = await client.sources.add_archive("demo", folder / "code.zip")
    added = await client.sources.wait(added.name)
    snapshot = await client.snapshots.create("demo")
    scan = await client.scans.create("demo", snapshot.name, ScanSettings(max_loss=100, min_tokens=8))
    scan = await client.scans.wait(scan.name)
    assert added.file_count == 16 and scan.dataset, scan.status.failure
    run = await client.runs.create("demo", QUICK)
    run = await client.runs.wait(run.name)
    assert run.status.state == JOB_STATE_SUCCEEDED and run.best_checkpoint, run.status.failure
    sha256 = (await client.runs.checkpoint(run.best_checkpoint)).sha256
    await until_serving(replica, sha256)
    return sha256


async def complete(client: AsyncCodegraft, prefix: str) -> str:
    """SHA-256 of the adapter that answered."""
    pieces = [piece async for piece in client.completions.complete("demo", prefix=prefix, max_tokens=4)]
    started = pieces[0].started
    assert started is not None and pieces[-1].finished is not None
    return started.adapter_sha256


async def until_serving(replica: Replica, sha256: str) -> None:
    async with asyncio.timeout(30), contextlib.aclosing(replica.follower.changes("projects/demo")) as changes:
        async for _ in changes:
            if (main := replica.registry.route("projects/demo").main) is not None and main.sha256 == sha256:
                return


async def test_one_trace_from_a_source_to_the_first_completion(
    runtime: Runtime, base: str, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the sockets' names are short
    async with house(runtime, base, tmp_path / "cache") as replica, AsyncCodegraft(ADDRESSES) as client:
        await replica.model
        with tracing.under(f"00-{TRACE}-{CALLER}-01"):
            await client.projects.create("demo")
            # The replica follows the project from its first completion on.
            await complete(client, "def before(")
            sha256 = await through_the_house(client, replica, tmp_path)
        # Somebody else's, without a trace.
        assert await complete(client, "def main(") == sha256
        await until_told(catalogue.find(base).id)
    spans = recorder.of(TRACE)
    by_id = {span.context.span_id: span for span in spans}
    assert {span.name for span in spans} >= {
        "codegraft.ingest.v1.SourceService/CreateSource",
        "fetch source",
        "open source",
        "read source",
        "codegraft.scanner.v1.ScanService/CreateScan",
        "scan",
        "scan stage 1",
        "scan-part",
        "scan stage 2",
        "codegraft.trainer.v1.RunService/CreateRun",
        "run",
        "fetch dataset and model",
        "evaluate",
        "train steps",
        "checkpoint",
        "publish codegraft.trainer.checkpoint.best.v1",
        "adapter fetch",
        "adapter verify",
        "adapter stage",
        "adapter probe",
        "adapter swap",
        "first completion",
    }
    lost = [span.name for span in spans if span.parent and span.parent.span_id not in {*by_id, int(CALLER, 16)}]
    assert not lost, "every span hangs on another of the trace, or on the caller's"
    first = next(span for span in spans if span.name == "first completion")
    ways = [way(span, by_id) for span in spans if span.name == "first completion"]
    assert len(ways) == 1, "one swap, one first completion"
    assert "adapter swap" in ways[0] and "run" in ways[0]
    assert ways[0][-1] == "codegraft.trainer.v1.RunService/CreateRun"
    (link,) = first.links
    served = next(span for span in recorder.spans() if span.context.span_id == link.context.span_id)
    assert served.kind is SpanKind.SERVER and served.name.endswith("CompletionService/Complete")
    kinds = {(span.name, span.kind) for span in spans if span.name.endswith("CreateScan")}
    assert {kind for _, kind in kinds} == {SpanKind.CLIENT, SpanKind.SERVER}
    assert "def main" not in "".join(span.to_json() for span in recorder.spans())


def way(span: ReadableSpan, by_id: dict[int, ReadableSpan]) -> list[str]:
    """The names from a span up to the first of ours."""
    names = [span.name]
    while span.parent is not None and span.parent.span_id in by_id:
        span = by_id[span.parent.span_id]
        names.append(span.name)
    return names


Figures = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read() -> Figures:
    """A scrape."""
    text = generate_latest(metrics.REGISTRY).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def until_told(model: str) -> None:
    """A client sees the end of a job a moment before its worker has told of it and ended its span."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return check(read(), model)
        except (AssertionError, KeyError):
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.05)


def check(figures: Figures, model: str) -> None:
    """What the way through the house has left."""

    def of(name: str, **labels: str) -> float:
        return figures[name, tuple(sorted(labels.items()))]

    calls = "codegraft.trainer.v1.RunService/CreateRun"
    assert of("rpc_server_call_duration_seconds_count", rpc_method=calls, rpc_response_status_code="OK") >= 1
    assert of("codegraft_job_attempt_seconds_count", kind="scan", outcome="SUCCEEDED") >= 1
    assert of("codegraft_job_attempt_seconds_count", kind="run", outcome="SUCCEEDED") >= 1
    assert of("codegraft_part_seconds_count", kind="scan-part", outcome="MADE") >= 2
    assert of("codegraft_jobs", kind="run", state="QUEUED") == of("codegraft_jobs", kind="run", state="RUNNING") == 0
    assert of("codegraft_nats_connected", connection="codegraft") == 1
    assert of("codegraft_ingest_sources", state="READY") == 1
    assert of("codegraft_ingest_fetch_seconds_count", outcome="FETCHED") >= 1
    assert of("codegraft_scanner_files_total", reason="ACCEPTED") >= 10
    assert of("codegraft_trainer_steps_total") >= 8
    assert (
        0 < of("codegraft_trainer_test_loss", project="demo") < of("codegraft_trainer_base_test_loss", project="demo")
    )
    assert of("codegraft_inference_queue_depth", namespace="ml", project="demo") == 0
    assert of("codegraft_inference_model_loaded", model=model) == 1
    assert of("codegraft_inference_adapters", state="serving") == 1
    assert of("codegraft_inference_adapter_behind", project="demo") == 0
    assert of("codegraft_inference_swap_seconds_count", phase="total") >= 1
    assert of("codegraft_inference_generated_tokens_total") >= 6
    assert of("codegraft_inference_prompt_tokens_total") >= 18
    assert of("gen_ai_server_time_to_first_token_seconds_count") >= 2
    assert of("gen_ai_server_time_per_output_token_seconds_count") >= 1
    assert of("codegraft_events_published_total", type="codegraft.trainer.checkpoint.best.v1") >= 1
