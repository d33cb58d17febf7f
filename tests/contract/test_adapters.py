"""Adapters out of the house and into it: the real client against the real service, over fakes of NATS and the store."""

from __future__ import annotations

import asyncio
import hashlib
import json
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from codegraft.common.v1.artifact_pb2 import ArtifactFile, FileChunk
from codegraft.common.v1.job_pb2 import JOB_STATE_SUCCEEDED
from codegraft.trainer.v1 import adapter_pb2 as pb
from codegraft.trainer.v1.adapter_pb2_grpc import AdapterServiceStub
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest, Checkpoint
from codegraft.trainer.v1.run_pb2 import Run
from services.client import Addresses, AsyncCodegraft
from services.core import errors
from services.core.jobs import new_status
from services.core.models import adapter_files, prompts, weights
from services.core.rpc.interceptors import CallInterceptor
from services.core.rpc.status import from_rpc
from services.core.runtime import Runtime
from services.inference.adapters import lora, verify
from services.inference.adapters.verify import Base
from services.trainer.adapters import export
from services.trainer.adapters.merge import Merged
from services.trainer.assembly import Trainer
from services.trainer.config import TrainerSettings
from tests.contract.storage_limit import limit_storage
from tests.unit.trainer.whole import make_adapter, make_base

RUN = "projects/demo/runs/r-1"
CHECKPOINT = f"{RUN}/checkpoints/12"
WEIGHTS, CONFIG = adapter_files.WEIGHTS, adapter_files.CONFIG


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter"))


@dataclass
class House:
    """A trainer that answers, and a client."""

    runtime: Runtime
    settings: TrainerSettings
    tables: Any
    client: AsyncCodegraft
    stub: Any
    uploads: Any
    """The blocking stub: services/client/streams.py says why."""
    model: str

    async def upload(self, folder: Path, **options: Any) -> Run:
        return await self.client.adapters.upload("demo", folder, **{"base_model": self.model, **options})


@pytest.fixture
async def house(base: Path, adapter: Path, tmp_path: Path) -> AsyncIterator[House]:
    """With one run whose best checkpoint is at step 12, as a worker leaves it."""
    runtime = Runtime.memory()
    settings = TrainerSettings(trainer_model=f"dir:{base}", cache_dir=tmp_path / "cache", trainer_workers=0)
    trainer = Trainer(runtime, settings, newest=None)  # type: ignore[arg-type]
    files = {name: adapter / name for name in (WEIGHTS, CONFIG)}
    sha256 = adapter_files.version(adapter)
    digest = weights.base_digest(base)
    manifest = AdapterManifest(
        name=CHECKPOINT, sha256=sha256, base_model=f"dir:{base}", base_digest=digest, lora_r=4, lora_alpha=8.0
    )
    await runtime.artifacts.commit(CHECKPOINT, manifest, dict(files))
    await trainer.tables.checkpoints.create(Checkpoint(name=CHECKPOINT, step=12, sha256=sha256))
    await trainer.tables.runs.create(Run(name=RUN, best_checkpoint=CHECKPOINT, status=new_status()))
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    for add, servicer, _ in trainer.services:
        add(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with (
        AsyncCodegraft(Addresses(address, address, address, address)) as client,
        grpc.aio.insecure_channel(address) as channel,
    ):
        with grpc.insecure_channel(address) as blocking:
            stubs = AdapterServiceStub(channel), AdapterServiceStub(blocking)
            yield House(runtime, settings, trainer.tables, client, *stubs, f"dir:{base}")
    await server.stop(0)


def left(folder: Path, pattern: str = "*") -> list[Path]:
    """What lies in a folder."""
    return list(folder.glob(pattern))


# --- out ---


async def test_an_adapter_arrives_as_it_is_stored(house: House, adapter: Path, tmp_path: Path) -> None:
    header = await house.client.adapters.download(f"{RUN}/checkpoints/best", tmp_path / "to")
    assert header.checkpoint == CHECKPOINT and sorted(file.path for file in header.files) == [CONFIG, WEIGHTS]
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "to" / name).read_bytes() == (adapter / name).read_bytes()
    assert not left(tmp_path, ".*")
    with pytest.raises(errors.FailedPrecondition):
        await house.client.adapters.download(CHECKPOINT, tmp_path / "to")
    (tmp_path / "to" / CONFIG).write_text("old")
    (tmp_path / "to" / "mine.txt").write_text("mine")
    await house.client.adapters.download(CHECKPOINT, tmp_path / "to", overwrite=True)
    assert (tmp_path / "to" / CONFIG).read_bytes() == (adapter / CONFIG).read_bytes()
    assert (tmp_path / "to" / "mine.txt").read_text() == "mine"


async def test_a_merged_model_and_a_gguf_file(house: House, tmp_path: Path) -> None:
    told: list[str] = []
    header = await house.client.adapters.download(
        CHECKPOINT,
        tmp_path / "merged",
        format=pb.ADAPTER_FORMAT_MERGED,
        on_progress=lambda progress: told.append(progress.message),
    )
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.path for file in header.files}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").num_parameters() > 0
    assert told[-1] == "downloading"
    header = await house.client.adapters.download(CHECKPOINT, tmp_path / "gguf", format=pb.ADAPTER_FORMAT_GGUF)
    assert [file.path for file in header.files] == ["model.gguf"]
    assert (tmp_path / "gguf" / "model.gguf").read_bytes()[:4] == b"GGUF"
    assert not left(house.settings.cache_dir / "exports"), "what is downloaded is removed"


async def test_a_broken_download_goes_on_where_it_stopped(
    house: House, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets: list[int] = []
    whole = export.Export.chunks
    size = (adapter / WEIGHTS).stat().st_size

    async def breaking(self: export.Export, offset: int) -> AsyncIterator[tuple[int, bytes]]:
        offsets.append(offset)
        sent = 0
        async for chunk in whole(self, offset):
            yield chunk
            sent += len(chunk[1])
            if len(offsets) == 1 and sent > size / 2:
                raise errors.StoreUnavailable("pulled the plug")

    monkeypatch.setattr(export, "CHUNK", 4096)
    monkeypatch.setattr(export.Export, "chunks", breaking)
    await house.client.adapters.download(CHECKPOINT, tmp_path / "to")
    assert len(offsets) == 2 and offsets[1] > size / 2
    assert (tmp_path / "to" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()


async def test_what_arrives_damaged_is_not_put_in_place(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export.Export.chunks

    async def damaging(self: export.Export, offset: int) -> AsyncIterator[tuple[int, bytes]]:
        async for position, data in whole(self, offset):
            yield position, bytes(len(data))

    monkeypatch.setattr(export.Export, "chunks", damaging)
    with pytest.raises(errors.DigestMismatch):
        await house.client.adapters.download(CHECKPOINT, tmp_path / "to")
    assert not (tmp_path / "to").exists() and not left(tmp_path, ".*")


async def test_a_caller_who_leaves_ends_the_conversion(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, read = Merged.tensors, 0

    def slow(self: Merged, file: Path) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal read
        for named in whole(self, file):
            read += 1
            time.sleep(0.3)  # six seconds for all
            yield named

    monkeypatch.setattr(Merged, "tensors", slow)
    monkeypatch.setattr(export, "_TELL_SECONDS", 0.02)
    call = house.stub.DownloadCheckpoint(pb.DownloadCheckpointRequest(name=CHECKPOINT, format=pb.ADAPTER_FORMAT_MERGED))
    exports = house.settings.cache_dir / "exports"
    async for message in call:
        assert message.WhichOneof("part") == "progress"
        if read:
            break
    assert left(exports)
    call.cancel()
    async with asyncio.timeout(20):
        while left(exports):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert read < 15, "it went on to the end"
    monkeypatch.setattr(Merged, "tensors", whole)
    await house.client.adapters.download(CHECKPOINT, tmp_path / "to", format=pb.ADAPTER_FORMAT_MERGED)


async def test_a_base_that_changed_is_not_merged_into(house: House, base: Path, tmp_path: Path) -> None:
    manifest = await house.runtime.artifacts.manifest(CHECKPOINT, AdapterManifest)
    manifest.name, manifest.base_digest = f"{RUN}/checkpoints/13", "0" * 64
    files = await house.runtime.artifacts.fetch(CHECKPOINT, manifest.files)
    await house.runtime.artifacts.commit(manifest.name, manifest, {n: files / n for n in (WEIGHTS, CONFIG)})
    await house.tables.checkpoints.create(Checkpoint(name=manifest.name, step=13))
    with pytest.raises(errors.BaseModelMismatch):
        await house.client.adapters.download(manifest.name, tmp_path / "to", format=pb.ADAPTER_FORMAT_MERGED)


@pytest.mark.parametrize(
    ("fields", "expected", "at"),
    [
        ({"name": "projects/demo"}, errors.InvalidName, "name"),
        ({"name": f"{RUN}/checkpoints/99"}, errors.CheckpointNotFound, "name"),
        ({"name": "projects/demo/runs/none/checkpoints/best"}, errors.RunNotFound, "name"),
        ({"format": pb.ADAPTER_FORMAT_UNSPECIFIED}, errors.InvalidArgument, "format"),
        ({"format": 77}, errors.InvalidArgument, "format"),
        ({"offset": -1}, errors.InvalidArgument, "offset"),
    ],
)
async def test_a_bad_download_is_refused_with_its_field(
    house: House, fields: dict[str, Any], expected: type[errors.CodegraftError], at: str
) -> None:
    request = {"name": CHECKPOINT, "format": pb.ADAPTER_FORMAT_PEFT, **fields}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in house.stub.DownloadCheckpoint(pb.DownloadCheckpointRequest(**request)):
            pass
    error = from_rpc(caught.value)
    assert type(error) is expected and error.field == at and error.hint


# --- in ---


async def test_an_uploaded_adapter_can_serve_and_leave_again(
    house: House, base: Path, adapter: Path, tmp_path: Path
) -> None:
    run = await house.upload(adapter, title="from elsewhere")
    assert run.imported and run.status.state == JOB_STATE_SUCCEEDED and run.title == "from elsewhere"
    assert not run.best_checkpoint and not run.HasField("best_test_loss") and run.base_model == house.model
    assert (await house.client.runs.get("projects/demo/runs/latest")).name == run.name
    (checkpoint,) = [found async for found in house.client.runs.checkpoints(run.name)]
    assert not checkpoint.best and not checkpoint.HasField("test_loss")
    assert checkpoint.base_digest == weights.base_digest(base)
    (event,) = [message.event async for message in house.client.runs.watch(run.name) if message.HasField("event")]
    assert event.checkpoint.sha256 == checkpoint.sha256
    # Serving would take it.
    manifest = await house.runtime.artifacts.manifest(checkpoint.name, AdapterManifest)
    folder = await house.runtime.artifacts.fetch(manifest.name, manifest.files)
    layers = lora.adaptable(weights.load_model(base, torch.float32))
    fmt = prompts.detect(weights.load_tokenizer(base))
    serving = Base(house.model, weights.base_digest(base), fmt, layers, 256)
    verify.check_manifest(manifest, serving)
    assert verify.check_config((folder / CONFIG).read_bytes(), manifest) == 2.0
    assert verify.check_tensors(load_file(folder / WEIGHTS), manifest, serving).keys() == layers.keys()
    await house.client.adapters.download(checkpoint.name, tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()


async def test_an_upload_has_to_fit_its_project(house: House, adapter: Path, spool: Path) -> None:
    used = await house.runtime.storage.used("projects/demo")
    size = sum((adapter / name).stat().st_size for name in (WEIGHTS, CONFIG))
    assert used == size, "the checkpoint that is there"
    await limit_storage(house.runtime, "projects/demo", used + size - 1)
    stored = [key async for key in house.runtime.store.list("")]
    with pytest.raises(errors.QuotaExceeded) as told:
        await house.upload(adapter)
    assert told.value.metadata["used"] == str(used) and f"uses {used:,}" in told.value.message
    assert told.value.metadata["owner"] == "projects/demo" and not left(spool)
    assert [key async for key in house.runtime.store.list("")] == stored, "refused before anything is written"
    # There is room for one: of two at once, one gets it.
    await limit_storage(house.runtime, "projects/demo", used + size)
    tried = await asyncio.gather(
        *(house.upload(adapter, request_id=each) for each in ("one", "other")), return_exceptions=True
    )
    assert {type(each) for each in tried} == {Run, errors.QuotaExceeded}
    assert await house.runtime.storage.used("projects/demo") == used + size


async def test_the_same_upload_makes_one_run(house: House, base: Path, adapter: Path, tmp_path: Path) -> None:
    one, other = await asyncio.gather(*(house.upload(adapter, request_id="once") for _ in range(2)))
    assert one == other == await house.upload(adapter, request_id="once")
    another = make_adapter(base, tmp_path / "other", rank=2)
    for attempt in (house.upload(another, request_id="once"), house.upload(adapter, request_id="once", title="t")):
        with pytest.raises(errors.RequestIdReused) as caught:
            await attempt
        assert caught.value.field == "header.request_id"
    assert (await house.upload(adapter)).name != one.name


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def option(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **values}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    return lambda folder: rewrite(folder, change)


def first(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors[min(tensors)]


def cut(folder: Path, keep: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])


BAD: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda folder: cut(folder, 5000),
    "header cut": lambda folder: cut(folder, 5),
    "not safetensors": lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 4096),
    "pickle in disguise": lambda folder: torch.save({"a": torch.ones(1)}, folder / WEIGHTS),
    "no number": tensors(lambda t: first(t).view(-1)[7].fill_(float("nan"))),
    "infinite": tensors(lambda t: first(t).view(-1)[7].fill_(float("inf"))),
    "integers": tensors(lambda t: t.update({min(t): first(t).to(torch.int32)})),
    "rank of the tensors": option(r=8),
    "rank too large": option(r=300),
    "rank zero": option(r=0),
    "alpha": option(lora_alpha=float("nan")),
    "half a pair": tensors(lambda t: t.pop(min(t))),
    "no tensors": tensors(lambda t: t.clear()),
    "strange tensor": tensors(lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)})),
    "embeddings": tensors(lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(4, 64)})),
    "config is no JSON": lambda folder: (folder / CONFIG).write_text("{"),
    "config is a list": lambda folder: (folder / CONFIG).write_text("[1]"),
    "config is no text": lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe"),
    "config is deep": lambda folder: (folder / CONFIG).write_text("[" * 100_000),
    "not LoRA": option(peft_type="IA3"),
    "DoRA": option(use_dora=True),
    "bias": option(bias="all"),
    "modules_to_save": option(modules_to_save=["lm_head"]),
    "rank_pattern": option(rank_pattern={"q_proj": 2}),
    "layer_replication": option(layer_replication=[[0, 2]]),
    "PiSSA": option(init_lora_weights="pissa_niter_4"),
}


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    """The adapter, to be damaged."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in (WEIGHTS, CONFIG):
        (folder / name).write_bytes((adapter / name).read_bytes())
    return folder


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    (tmp_path / "spool").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spool"))
    return tmp_path / "spool"


async def test_an_adapter_that_could_not_serve_stays_outside(house: House, copy: Path, spool: Path) -> None:
    whole = {name: (copy / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    for what, damage in BAD.items():
        damage(copy)
        with pytest.raises(errors.AdapterRejected) as caught:
            await house.upload(copy)
        assert caught.value.message, what
        for name, content in whole.items():
            (copy / name).write_bytes(content)
    assert not left(spool)
    assert [run.name async for run in house.client.runs.list("demo")] == [RUN]
    assert await house.upload(copy), "undamaged it is taken"


async def test_an_adapter_of_another_base(house: House, copy: Path, tmp_path: Path) -> None:
    other = make_base("starcoder2", tmp_path / "other")
    with pytest.raises(errors.AdapterRejected, match="no layer for tensor"):
        await house.upload(copy, base_model=f"dir:{other}")
    with pytest.raises(errors.ModelNotFound):
        await house.upload(copy, base_model="nope")
    option(base_model_name_or_path="Qwen/Qwen2.5-Coder-7B")(copy)
    assert await house.upload(copy), "a folder may hold any model: there the shapes decide"


async def refused(house: House, *parts: Any) -> errors.CodegraftError:
    """The answer to a header (its files, or None for no header) and chunks."""
    requests = [
        pb.ImportAdapterRequest(chunk=part)
        if isinstance(part, FileChunk)
        else pb.ImportAdapterRequest(header=pb.ImportHeader(parent="projects/demo", base_model=house.model, files=part))
        for part in parts
    ]
    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.to_thread(house.uploads.ImportAdapter, iter(requests), timeout=20)
    return from_rpc(caught.value)


def files(**changes: Any) -> list[ArtifactFile]:
    """Announced as two files of three bytes, "abc"."""
    digest = hashlib.sha256(b"abc").hexdigest()
    both = [ArtifactFile(path=path, size=3, sha256=digest) for path in (WEIGHTS, CONFIG)]
    for field, value in changes.items():
        setattr(both[0], field, value)
    return both


def chunk(offset: int, data: bytes) -> FileChunk:
    return FileChunk(offset=offset, data=data)


@pytest.mark.parametrize(
    "path",
    [
        *("adapter_model.bin", "model.pkl", "x.pt", "../adapter_model.safetensors", "/etc/passwd", "a/b", "", "."),
        *("adapter_model.safetensors\0", "ADAPTER_MODEL.SAFETENSORS", "adapter_model.safetensors/../x", "README.md"),
    ],
)
async def test_only_the_two_files_are_taken(house: House, spool: Path, path: str) -> None:
    error = await refused(house, files(path=path), chunk(0, b"abcabc"))
    assert type(error) is errors.InvalidArgument and error.field == "header.files" and error.hint
    assert ("safetensors" in error.hint) and not left(spool)


async def test_bytes_that_are_not_those_announced(house: House, spool: Path) -> None:
    both = chunk(0, b"abcabc")
    for parts, expected, field in (
        ((both,), errors.InvalidArgument, "header"),
        ((), errors.InvalidArgument, "header"),
        ((files(), files()), errors.InvalidArgument, "chunk"),
        ((files()[:1], both), errors.InvalidArgument, "header.files"),
        ((files() + files(), both), errors.InvalidArgument, "header.files"),
        ((files(size=0), both), errors.LimitExceeded, "header.files"),
        ((files(size=-1), both), errors.LimitExceeded, "header.files"),
        ((files(size=1 << 50), both), errors.LimitExceeded, "header.files"),
        ((files(sha256="x"), both), errors.InvalidArgument, "header.files"),
        ((files(), chunk(0, b"abcab")), errors.UploadMismatch, "chunk"),
        ((files(), chunk(0, b"abcabcd")), errors.UploadMismatch, "header.files"),
        ((files(), chunk(0, b"abc"), chunk(4, b"bc")), errors.UploadMismatch, "chunk.offset"),
        ((files(), chunk(0, b"abcabd")), errors.UploadMismatch, "header.files"),
        ((files(), chunk(0, bytes((1 << 20) + 1))), errors.InvalidArgument, "chunk.data"),
    ):
        error = await refused(house, *parts)
        assert type(error) is expected and error.field == field and error.hint, (parts, error)
    assert not left(spool)
