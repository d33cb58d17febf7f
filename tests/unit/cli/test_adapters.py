"""``codegraft train download`` and ``upload`` over the wire."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codegraft.common.v1.artifact_pb2 import ArtifactFile, FileChunk
from codegraft.common.v1.job_pb2 import Progress
from codegraft.trainer.v1 import adapter_pb2 as pb
from codegraft.trainer.v1 import checkpoint_pb2, run_pb2
from services.core import errors

Codegraft = Callable[..., Any]
RUN = "projects/acme/runs/r-1"


def answer(content: bytes = b"weights", announced: bytes = b"weights", path: str = "model.gguf") -> list[Any]:
    file = ArtifactFile(path=path, size=len(announced), sha256=hashlib.sha256(announced).hexdigest())
    header = pb.DownloadHeader(checkpoint=f"{RUN}/checkpoints/7", sha256="ab" * 32, files=[file])
    return [
        pb.DownloadCheckpointResponse(progress=Progress(done=1, total=2, unit="bytes", message="merging")),
        pb.DownloadCheckpointResponse(header=header),
        pb.DownloadCheckpointResponse(chunk=FileChunk(offset=0, data=content)),
    ]


@pytest.fixture
def trainer(fake: Any) -> Any:
    """One run; its best checkpoint is at step 7."""
    run = run_pb2.Run(name=RUN, best_checkpoint=f"{RUN}/checkpoints/7")
    fake.answers.update(GetRun=run_pb2.GetRunResponse(run=run), DownloadCheckpoint=answer())
    return fake


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ([], f"{RUN}/checkpoints/7"),
        (["r-1"], f"{RUN}/checkpoints/7"),
        ([RUN], f"{RUN}/checkpoints/7"),
        (["r-1/30"], f"{RUN}/checkpoints/30"),
        (["latest/best"], f"{RUN}/checkpoints/best"),
        ([f"{RUN}/checkpoints/30"], f"{RUN}/checkpoints/30"),
    ],
)
def test_download_takes_a_run_a_step_or_a_full_name(
    trainer: Any, codegraft: Codegraft, tmp_path: Path, argument: list[str], name: str
) -> None:
    options = ["-p", "acme", "-o", str(tmp_path / "to"), "--format", "gguf", "--gguf-type", "bf16"]
    done = codegraft("train", "download", *argument, *options)
    assert done.code == 0, done.err
    request = trainer.last("DownloadCheckpoint")
    assert (request.name, request.format, request.gguf_type) == (name, pb.ADAPTER_FORMAT_GGUF, pb.GGUF_TYPE_BF16)
    assert (tmp_path / "to" / "model.gguf").read_bytes() == b"weights" and "7 bytes" in done.err


def test_download_overwrites_only_when_it_is_told_to(trainer: Any, codegraft: Codegraft, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("mine")
    done = codegraft("train", "download", "-p", "acme", "-o", str(tmp_path))
    assert done.code == 4 and "--force" in done.err and "DownloadCheckpoint" not in trainer.requests
    done = codegraft("train", "download", "-p", "acme", "-o", str(tmp_path), "--force", "--json")
    assert done.code == 0 and (tmp_path / "model.gguf").read_bytes() == b"weights"
    assert json.loads(done.out)["checkpoint"] == f"{RUN}/checkpoints/7"


@pytest.mark.parametrize(
    "stream",
    [answer(b"wEights"), answer(b"weight"), answer(b"weights!"), answer()[:2], answer()[:1], answer(path="../x")],
)
def test_what_is_not_as_announced_leaves_nothing(
    trainer: Any, codegraft: Codegraft, tmp_path: Path, stream: list[Any]
) -> None:
    trainer.answers["DownloadCheckpoint"] = stream
    assert codegraft("train", "download", "-p", "acme", "-o", str(tmp_path / "to")).code != 0
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_best_gives_its_only_checkpoint_or_asks_for_a_step(
    trainer: Any, codegraft: Codegraft, tmp_path: Path
) -> None:
    trainer.answers["GetRun"] = run_pb2.GetRunResponse(run=run_pb2.Run(name=RUN, imported=True))
    found = [checkpoint_pb2.Checkpoint(name=f"{RUN}/checkpoints/{step}", step=step) for step in (0, 10)]
    trainer.answers["ListCheckpoints"] = run_pb2.ListCheckpointsResponse(checkpoints=found[:1])
    assert codegraft("train", "download", "-p", "acme", "-o", str(tmp_path / "to")).code == 0
    assert trainer.last("DownloadCheckpoint").name == f"{RUN}/checkpoints/0"
    trainer.answers["ListCheckpoints"] = run_pb2.ListCheckpointsResponse(checkpoints=found)
    done = codegraft("train", "download", "-p", "acme", "-o", str(tmp_path / "other"))
    assert done.code == 3 and "r-1/10" in done.err


def test_upload_sends_the_two_files_and_says_how_to_serve_it(fake: Any, codegraft: Codegraft, tmp_path: Path) -> None:
    run = run_pb2.Run(name=RUN, base_model="smollm2-135m", imported=True)
    fake.answers["ImportAdapter"] = pb.ImportAdapterResponse(run=run)
    for name, text in (("adapter_model.safetensors", "ab"), ("adapter_config.json", "cde"), ("README.md", "x")):
        (tmp_path / name).write_text(text)
    done = codegraft("train", "upload", str(tmp_path), "-p", "acme", "--model", "smollm2-135m", "--title", "t")
    assert done.code == 0 and "codegraft serve set r-1/0 --project acme" in done.err
    first, *chunks = fake.last("ImportAdapter")
    assert (first.header.parent, first.header.base_model, first.header.title) == ("projects/acme", "smollm2-135m", "t")
    assert first.header.request_id
    assert [(file.path, file.size) for file in first.header.files] == [
        ("adapter_model.safetensors", 2),
        ("adapter_config.json", 3),
    ]
    assert [(part.chunk.offset, part.chunk.data) for part in chunks] == [(0, b"ab"), (2, b"cde")]
    fake.answers["ImportAdapter"] = errors.AdapterRejected("it has rank 8", hint="Train it with rank 4.")
    done = codegraft("train", "upload", str(tmp_path), "-p", "acme")
    assert done.code == 4 and "rank 8" in done.err and "rank 4" in done.err
    assert codegraft("train", "upload", str(tmp_path / "none"), "-p", "acme").code == 2
