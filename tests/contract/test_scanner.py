"""The scanner service over gRPC with fakes of NATS and the store, and a tiny model: jobs, logs, datasets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import duckdb
import grpc
import pytest
import torch

from codegraft.common.v1.job_pb2 import JOB_STATE_CANCELLED
from codegraft.common.v1.split_pb2 import Split
from codegraft.ingest.v1.project_pb2 import Project
from codegraft.ingest.v1.source_pb2 import Source
from codegraft.scanner.v1 import scan_pb2_grpc
from codegraft.scanner.v1.dataset_pb2 import Dataset, DatasetManifest
from codegraft.scanner.v1.scan_pb2 import Scan, ScanSettings
from codegraft.scanner.v1.verdict_pb2 import VERDICT_REASON_DUPLICATE, VerdictFilter, VerdictReason
from services.client import Addresses, AsyncCodegraft
from services.core import errors
from services.core.jobs import JobRunner
from services.core.jobs.parts import PartRunner
from services.core.quota.jobs import places
from services.core.quota.limits import Kind
from services.core.rpc.interceptors import CallInterceptor
from services.core.runtime import Runtime
from services.core.state import Table
from services.ingest import snapshot
from services.scanner import part_worker
from services.scanner.config import ScannerSettings
from services.scanner.part_worker import PartWorker
from services.scanner.servicer import KIND, ScanServicer
from services.scanner.worker import ScanWorker
from tests.contents import stored
from tests.contract.storage_limit import limit_storage
from tests.unit.inference import tiny

PROJECT = "projects/demo"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny.make_tokenizer()
    tiny.make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"dir:{folder}"


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime.memory(tmp_path)


@asynccontextmanager
async def serving(runtime: Runtime, model: str, *, workers: int = 1) -> AsyncIterator[AsyncCodegraft]:
    settings = ScannerSettings(scanner_model=model, scanner_batch_tokens=512, scanner_device="cpu", scanner_threads=1)
    state = runtime.state("scanner")
    scans = Table(state, Scan, missing=errors.ScanNotFound)
    datasets = Table(state, Dataset, missing=errors.DatasetNotFound)
    room = places(runtime.quotas, Kind.SCANS, state, scans)
    running = []
    for number in range(workers):
        worker, maker = ScanWorker(runtime, settings, scans, datasets), PartWorker(runtime, settings, scans)
        runner = JobRunner(KIND, scans, runtime.jobs, worker.handle, worker_id=f"w{number}")
        parts = PartRunner(part_worker.KIND, runtime.store, runtime.jobs, maker.make)
        running += [asyncio.create_task(runner.run()), asyncio.create_task(parts.run())]
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    scan_pb2_grpc.add_ScanServiceServicer_to_server(ScanServicer(runtime, settings, scans, datasets, room), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        async with AsyncCodegraft(Addresses(address, address, address, address)) as client:
            yield client
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await server.stop(None)


async def take(runtime: Runtime, sources: dict[str, dict[str, bytes]], test: str = "") -> str:
    """A snapshot of these files, as ingest makes it."""
    parts = []
    for name, files in sources.items():
        listed = await stored(runtime.blobs, files)
        split = Split.SPLIT_TEST if name == test else Split.SPLIT_AUTO
        parts.append(snapshot.Part(Source(name=f"{PROJECT}/sources/{name}", split=split), Project(), listed))
    manifest, table = snapshot.build(PROJECT, parts)
    await runtime.artifacts.commit(manifest.name, manifest, {"files.parquet": table})
    return manifest.name


def code(number: int) -> bytes:
    return f"def function_{number}(value):\n    return value * {number} + {number % 7}\n".encode() * 2


FILES = {
    "lib": {f"m{number}.py": code(number) for number in range(12)}
    | {"copy.py": code(3), "held.py": code(99), "b.py": b"\0" * 99},
    "held": {"held.py": code(99)},
}
SETTINGS = ScanSettings(max_loss=100, min_tokens=8)
VERDICTS_ONLY = 8000
"""Bytes that the verdicts of FILES take, but not the dataset beside them."""


async def test_a_scan_makes_logs_and_a_dataset(runtime: Runtime, model: str) -> None:
    async with serving(runtime, model) as client:
        name = await take(runtime, FILES, test="held")
        scan = await client.scans.wait((await client.scans.create("demo", name, SETTINGS)).name)
        report = scan.report
        assert (report.file_count, report.accepted_count, report.rejected_count) == (16, 13, 3)
        assert {reason: count.files for reason, count in report.reasons.items()} == {
            "ACCEPTED": 13, "DUPLICATE": 2, "NOT_TEXT": 1,
        }  # fmt: skip
        rejected = {v.path: v async for v in client.scans.verdicts(scan.name, VerdictFilter(accepted=False))}
        assert set(rejected) == {"b.py", "copy.py", "held.py"} or set(rejected) == {"b.py", "m3.py", "held.py"}
        assert rejected["held.py"].source.endswith("/lib"), "the test file's copy must not stay in train"
        accepted = [v async for v in client.scans.verdicts(scan.name, VerdictFilter(accepted=True), page_size=5)]
        assert len(accepted) == 13 and all(v.loss > 0 and v.tokens > 8 for v in accepted)
        assert [v.path for v in accepted if v.split == Split.SPLIT_TEST] == ["held.py"]
        some = VerdictFilter(reasons=[VERDICT_REASON_DUPLICATE], path="h*.py")
        assert [v.path async for v in client.scans.verdicts(scan.name, some)] == ["held.py"]
        dataset = await client.datasets.get(f"{PROJECT}/datasets/latest")
        assert (dataset.name, dataset.train.files, dataset.test.files) == (scan.dataset, 12, 1)


async def test_the_dataset_is_parquet_that_others_open(runtime: Runtime, model: str) -> None:
    async with serving(runtime, model) as client:
        scan = await client.scans.create("demo", await take(runtime, FILES, test="held"), SETTINGS)
        scan = await client.scans.wait(scan.name)
        manifest = await runtime.artifacts.manifest(scan.dataset, DatasetManifest)
        folder = await runtime.artifacts.fetch(scan.dataset, manifest.files)
        train = duckdb.sql(f"select path, language, text, tokens, loss from '{folder}/train/*.parquet'").fetchall()
        test = duckdb.sql(f"select text from '{folder}/test/*.parquet'").fetchall()
    assert len(train) == 12 and {row[1] for row in train} == {"Python"}
    assert not {row[2] for row in train} & {row[0] for row in test}


async def test_the_same_again_is_the_same_dataset_from_the_cache(runtime: Runtime, model: str) -> None:
    async with serving(runtime, model, workers=2) as client:
        name = await take(runtime, FILES, test="held")
        first = await client.scans.wait((await client.scans.create("demo", name, SETTINGS)).name)
        again = await client.scans.wait((await client.scans.create("demo", name, SETTINGS)).name)
        assert again.dataset == first.dataset and again.name != first.name
        assert (first.report.cached_losses, again.report.cached_losses) == (0, 13)
        stricter = ScanSettings(max_loss=0.001, min_tokens=8)
        with pytest.raises(errors.EmptyDataset):
            await client.scans.wait((await client.scans.create("demo", name, stricter)).name)


async def test_no_accepted_file_fails_with_its_log_still_there(runtime: Runtime, model: str) -> None:
    async with serving(runtime, model) as client:
        name = await take(runtime, {"lib": {"a.txt": b"words\n", "b.py": b"\0" * 50}})
        scan = await client.scans.create("demo", name, SETTINGS)
        with pytest.raises(errors.EmptyDataset) as caught:
            await client.scans.wait(scan.name)
        assert caught.value.hint
        log = {v.path: VerdictReason.Name(v.reason) async for v in client.scans.verdicts(scan.name)}
        assert log == {"a.txt": "VERDICT_REASON_NOT_CODE", "b.py": "VERDICT_REASON_NOT_TEXT"}
        with pytest.raises(errors.DatasetNotFound):
            await client.datasets.get(f"{PROJECT}/datasets/latest")


async def test_cancelling(runtime: Runtime, model: str) -> None:
    async with serving(runtime, model, workers=0) as client:
        scan = await client.scans.create("demo", await take(runtime, FILES), SETTINGS)
        assert (await client.scans.cancel(scan.name)).status.state == JOB_STATE_CANCELLED
        with pytest.raises(errors.JobCancelled):
            await client.scans.wait(scan.name)


async def test_creating_twice(runtime: Runtime, model: str) -> None:
    async with serving(runtime, model, workers=0) as client:
        name = await take(runtime, FILES)
        first = await client.scans.create("demo", name, SETTINGS, request_id="r")
        assert (await client.scans.create("demo", name, SETTINGS, request_id="r")).name == first.name
        with pytest.raises(errors.RequestIdReused):
            await client.scans.create("demo", name, ScanSettings(max_loss=1), request_id="r")
        assert [s.name async for s in client.scans.list("demo")] == [first.name]
        async with aclosing(client.scans.watch_all("demo")) as everybodys:
            assert (await anext(everybodys)).scan.name == first.name


async def test_mistakes_have_their_reason(runtime: Runtime, model: str) -> None:
    async with serving(runtime, model, workers=0) as client:
        name = await take(runtime, FILES)
        cases: list[tuple[type[errors.CodegraftError], object]] = [
            (errors.SnapshotNotFound, client.scans.create("demo", f"{PROJECT}/snapshots/0123")),
            (errors.InvalidName, client.scans.create("demo", "snapshots/x")),
            (errors.InvalidName, client.scans.create("other", name)),
            (errors.InvalidArgument, client.scans.create("demo", name, ScanSettings(max_digit_share=2))),
            (errors.InvalidMask, client.scans.create("demo", name, ScanSettings(exclude=["!"]))),
            (errors.ModelNotFound, client.scans.create("demo", name, ScanSettings(model="dir:/nowhere"))),
            (errors.ScanNotFound, client.scans.get(f"{PROJECT}/scans/none")),
            (errors.ScanNotFound, client.scans.cancel(f"{PROJECT}/scans/none")),
            (errors.InvalidPageSize, anext(aiter(client.scans.list("demo", -1)))),
            (errors.DatasetNotFound, client.datasets.get(f"{PROJECT}/datasets/0123")),
        ]
        for error, call in cases:
            with pytest.raises(error):
                await call  # type: ignore[misc]


async def test_a_scan_without_room_ends_and_what_it_cannot_keep_is_not_there(runtime: Runtime, model: str) -> None:
    """Verdicts and dataset count, each before it is stored; and nobody begins a scan in a project that is full."""
    async with serving(runtime, model) as client:
        snapshot_name = await take(runtime, FILES, test="held")
        before = await runtime.storage.used(PROJECT)
        await limit_storage(runtime, PROJECT, before + 100)

        async def refused(scan: str) -> Scan:
            with pytest.raises(errors.QuotaExceeded) as told:
                await client.scans.wait(scan)
            assert f"uses {await runtime.storage.used(PROJECT):,}" in told.value.message
            ended = await client.scans.get(scan)
            assert ended.status.attempt == 1, "no further attempt makes room"
            return ended

        first = await refused((await client.scans.create("demo", snapshot_name, SETTINGS)).name)
        assert await runtime.storage.used(PROJECT) == before and not first.verdicts
        await limit_storage(runtime, PROJECT, before)
        with pytest.raises(errors.QuotaExceeded):
            await client.scans.create("demo", snapshot_name, SETTINGS)
        await limit_storage(runtime, PROJECT, before + VERDICTS_ONLY)
        second = await refused((await client.scans.create("demo", snapshot_name, SETTINGS)).name)
        assert second.verdicts == second.name and not second.dataset, "its verdicts had room"
        await limit_storage(runtime, PROJECT, None)
        scan = await client.scans.wait((await client.scans.create("demo", snapshot_name, SETTINGS)).name)
        assert scan.dataset
        size = await runtime.storage.used(PROJECT)
        await limit_storage(runtime, PROJECT, size + VERDICTS_ONLY)
        again = await client.scans.wait((await client.scans.create("demo", snapshot_name, SETTINGS)).name)
        assert again.dataset == scan.dataset, "what is there already needs no room"
