"""Base models in the object store: pushed through the trainer, brought from there by every service."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from codegraft.common.v1.artifact_pb2 import ArtifactFile, FileChunk
from codegraft.common.v1.job_pb2 import JOB_STATE_SUCCEEDED
from codegraft.ingest.v1.project_pb2 import Project
from codegraft.ingest.v1.source_pb2 import Source
from codegraft.scanner.v1.dataset_pb2 import Dataset
from codegraft.scanner.v1.scan_pb2 import Scan, ScanSettings
from codegraft.trainer.v1 import model_pb2 as pb
from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters
from codegraft.trainer.v1.run_pb2_grpc import ModelServiceStub
from services.client import Addresses, AsyncCodegraft
from services.core import errors
from services.core.jobs import JobRunner, is_final, new_status
from services.core.jobs.parts import PartRunner
from services.core.models import catalogue, stored, weights
from services.core.rpc.interceptors import CallInterceptor
from services.core.rpc.status import from_rpc
from services.core.runtime import Runtime
from services.core.state import Table
from services.core.store.blobs import key
from services.inference.assembly import Replica
from services.inference.config import InferenceSettings
from services.ingest import snapshot
from services.ingest.garbage import Garbage
from services.ingest.records import Tables as IngestTables
from services.scanner.config import ScannerSettings
from services.scanner.loss import FileLoss
from services.scanner.meter import Meter
from services.scanner.part_worker import PartWorker
from services.scanner.rules import Rules
from services.scanner.worker import ScanWorker
from services.trainer.assembly import Trainer
from services.trainer.config import TrainerSettings
from tests import contents
from tests.contract.test_trainer import QUICK, Scanner, commit_dataset
from tests.unit.trainer.whole import make_adapter, make_base

SPEC = catalogue.find("store:tiny-1.0")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("base"))


@dataclass
class House:
    """A trainer that works, and a client."""

    runtime: Runtime
    cache: Path
    client: AsyncCodegraft
    uploads: Any
    """The blocking stub: services/client/streams.py says why."""


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    runtime = Runtime.memory()
    await commit_dataset(runtime, tmp_path)
    cache = tmp_path / "cache"
    settings = TrainerSettings(
        trainer_device="cpu", trainer_threads=1, cache_dir=cache, trainer_max_model_bytes=1 << 20
    )
    trainer = Trainer(runtime, settings, Scanner())
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    for add, servicer, _ in trainer.services:
        add(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    tasks = [asyncio.ensure_future(background()) for background in trainer.background]
    async with AsyncCodegraft(Addresses(address, address, address, address)) as client:
        with grpc.insecure_channel(address) as channel:
            yield House(runtime, cache, client, ModelServiceStub(channel))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await server.stop(0)


def left(folder: Path) -> list[Path]:
    """What lies in a folder."""
    return list(folder.glob("*"))


async def test_a_pushed_model_is_listed_brought_trained_and_adapted(house: House, base: Path, tmp_path: Path) -> None:
    sent: list[int] = []
    model = await house.client.models.push(base, "tiny-1.0", on_progress=sent.append)
    assert model.id == SPEC.id and model.parameters > 0 and model.context_length == 512 and model.serving_bytes > 0
    assert sent == sorted(sent) and sent[-1] > (base / "model.safetensors").stat().st_size
    listed = [each async for each in house.client.models.list()]
    assert listed[0].id == catalogue.DEFAULT_MODEL and listed[-1] == model and not model.cached
    assert await house.client.models.push(base, "tiny-1.0") == model, "again it changes nothing"
    # Another machine brings it.
    await stored.bring(SPEC, tmp_path / "other", house.runtime.artifacts)
    folder = weights.ensure_weights(SPEC, tmp_path / "other")
    assert weights.base_digest(folder) == weights.base_digest(base)
    assert weights.load_tokenizer(folder).encode("def") == weights.load_tokenizer(base).encode("def")
    # The trainer trains on it, and takes adapters for it.
    run = await house.client.runs.create("demo", Hyperparameters(**{**QUICK, "train_steps": 4}), base_model=SPEC.id)
    assert (await house.client.runs.wait(run.name)).status.state == JOB_STATE_SUCCEEDED
    assert (await house.client.models.get(SPEC.id)).cached
    adapter = make_adapter(base, tmp_path / "adapter")
    assert (await house.client.adapters.upload("demo", adapter, base_model=SPEC.id)).base_model == SPEC.id
    # It stays when garbage is collected.
    tables = IngestTables.of(house.runtime.state("ingest"))
    async for _ in Garbage(house.runtime, tables, min_age=timedelta(0), dry_run=False).collect():
        pass
    for file in (await stored.manifest("tiny-1.0", house.runtime.artifacts)).files:
        assert await house.runtime.blobs.has(file.sha256), file.path


async def test_inference_brings_it_before_it_loads(house: House, base: Path, tmp_path: Path) -> None:
    await house.client.models.push(base, "tiny-1.0")
    settings = InferenceSettings(cache_dir=tmp_path / "served")

    def load() -> Any:
        assert weights.ensure_weights(SPEC, settings.cache_dir).is_dir()
        raise errors.FailedPrecondition("enough")

    nobody: Any = None
    replica = Replica(house.runtime, settings, SPEC, bests=nobody, projects=nobody, load=load)
    with pytest.raises(errors.FailedPrecondition, match="enough"):
        await replica.run()


class Seen(Meter):
    """Tells which model it was to measure with."""

    def __init__(self) -> None:
        super().__init__(ScannerSettings())
        self.folders: set[Path] = set()

    async def measure(
        self, folder: Path, rules: Rules, files: Sequence[tuple[str, str]], stop: threading.Event
    ) -> list[tuple[str, FileLoss]]:
        self.folders.add(folder)
        return [(sha256, FileLoss(1.0, 50, 50)) for sha256, _ in files]


async def test_a_scan_brings_it_to_every_worker(house: House, base: Path, tmp_path: Path) -> None:
    await house.client.models.push(base, "tiny-1.0")
    runtime, name = house.runtime, "projects/demo/scans/one"
    listed = await contents.stored(runtime.blobs, {"a.py": b"def add(a, b):\n    return a + b\n"})
    part = snapshot.Part(Source(name="projects/demo/sources/s"), Project(), listed)
    manifest, table = snapshot.build("projects/demo", [part])
    await runtime.artifacts.commit(manifest.name, manifest, {"files.parquet": table})
    scans = Table(runtime.state("scanner"), Scan, missing=errors.ScanNotFound)
    asked = ScanSettings(model=SPEC.id)
    await scans.create(Scan(name=name, snapshot=manifest.name, settings=asked, status=new_status()))
    # The one who leads the scan and the one who measures have caches of their own.
    leads, measures = (ScannerSettings(cache_dir=tmp_path / each) for each in ("leads", "measures"))
    datasets = Table(runtime.state("scanner"), Dataset, missing=errors.DatasetNotFound)
    meter = Seen()
    maker = PartWorker(runtime, measures, scans, meter)
    runners = (
        JobRunner("scan", scans, runtime.jobs, ScanWorker(runtime, leads, scans, datasets).handle, worker_id="w"),
        PartRunner("scan-part", runtime.store, runtime.jobs, maker.make),
    )
    tasks = [asyncio.ensure_future(runner.run()) for runner in runners]
    async with asyncio.timeout(20):
        async for scan in scans.watch(name):
            if is_final(scan.status):
                break
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert scan.status.state == JOB_STATE_SUCCEEDED, scan.status
    assert meter.folders == {weights.ensure_weights(SPEC, measures.cache_dir)}
    assert weights.is_cached(SPEC, leads.cache_dir)


async def test_a_model_in_the_store_never_changes(house: House, base: Path, tmp_path: Path) -> None:
    await house.client.models.push(base, "tiny-1.0")
    other = make_base("qwen2", tmp_path / "other")
    with pytest.raises(errors.ResourceExists) as caught:
        await house.client.models.push(other, "tiny-1.0")
    assert caught.value.field == "header.name"
    await house.client.models.push(other, "tiny-2.0")


async def test_what_is_not_there_and_what_came_damaged(house: House, base: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.ModelNotFound) as caught:
        await house.client.models.get("store:none")
    assert "codegraft models push" in caught.value.hint
    with pytest.raises(errors.ModelNotFound):
        await stored.bring(SPEC, tmp_path / "other", house.runtime.artifacts)
    with pytest.raises(errors.ModelNotFound):
        weights.ensure_weights(SPEC, tmp_path / "other")
    await house.client.models.push(base, "tiny-1.0")
    manifest = await stored.manifest("tiny-1.0", house.runtime.artifacts)
    (weights_file,) = (file for file in manifest.files if file.path == "model.safetensors")
    await house.runtime.store.put(key(weights_file.sha256), b"damaged")
    with pytest.raises(errors.DigestMismatch):
        await stored.bring(SPEC, tmp_path / "other", house.runtime.artifacts)
    assert not weights.is_cached(SPEC, tmp_path / "other")
    lying, files = pb.ModelManifest(name="models/lying", digest="0" * 64), {"config.json": base / "config.json"}
    await house.runtime.artifacts.commit(lying.name, lying, {**files, "a.safetensors": base / "model.safetensors"})
    with pytest.raises(errors.DigestMismatch):
        await stored.bring(catalogue.find("store:lying"), tmp_path / "other", house.runtime.artifacts)
    assert not weights.is_cached(catalogue.find("store:lying"), tmp_path / "other")


async def test_a_folder_that_is_no_model_stays_outside(house: House, base: Path, tmp_path: Path) -> None:
    for damage in (
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100),
    ):
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(base, broken)
        damage(broken)
        with pytest.raises(errors.ModelNotFound):
            await house.client.models.push(broken, "broken")
    (broken / "model.safetensors").write_bytes(bytes(2 << 20))
    with pytest.raises(errors.LimitExceeded):
        await house.client.models.push(broken, "broken")
    for name in ("Bad", "", "a/b", "..", "x" * 65):
        with pytest.raises(errors.InvalidName):
            await house.client.models.push(base, name)
    assert not [each async for each in house.client.models.list() if each.id.startswith("store:")]
    assert not left(house.cache / "incoming")


@pytest.mark.parametrize(
    "path", ["model.bin", "modeling.py", "../config.json", "a/config.json", ".json", "", "x\0.json"]
)
async def test_only_files_of_a_model_are_taken(house: House, path: str) -> None:
    file = ArtifactFile(path=path, size=2, sha256=hashlib.sha256(b"{}").hexdigest())
    requests = [
        pb.PushModelRequest(header=pb.ModelHeader(name="m", files=[file])),
        pb.PushModelRequest(chunk=FileChunk(data=b"{}")),
    ]
    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.to_thread(house.uploads.PushModel, iter(requests), timeout=10)
    error = from_rpc(caught.value)
    assert type(error) is errors.InvalidArgument and error.field == "header.files"


async def test_pages_of_models_go_on_behind_the_catalogue(house: House, base: Path) -> None:
    await house.client.models.push(base, "tiny-1.0")
    ids = [model.id async for model in house.client.models.list(page_size=7)]
    assert ids == [spec.id for spec in catalogue.all_models()] + [SPEC.id]
    assert (await house.client.models.get()).id == catalogue.DEFAULT_MODEL
