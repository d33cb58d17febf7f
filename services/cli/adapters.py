"""``codegraft train download`` and ``upload``: adapters as files."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from codegraft.trainer.v1.adapter_pb2 import AdapterFormat, GgufType
from services.cli.connect import Project, connect, full_name, id_of
from services.cli.output import Json, err, print_json
from services.cli.progress import JobBar
from services.client import Codegraft
from services.core import names
from services.core.errors import CheckpointNotFound


class Format(StrEnum):
    """What a checkpoint is downloaded as."""

    PEFT = "peft"
    MERGED = "merged"
    GGUF = "gguf"


class Type(StrEnum):
    """Type of the matrices in a GGUF file."""

    Q8_0 = "q8_0"
    BF16 = "bf16"
    F16 = "f16"


_FORMATS = {
    Format.PEFT: AdapterFormat.ADAPTER_FORMAT_PEFT,
    Format.MERGED: AdapterFormat.ADAPTER_FORMAT_MERGED,
    Format.GGUF: AdapterFormat.ADAPTER_FORMAT_GGUF,
}
_TYPES = {
    Type.Q8_0: GgufType.GGUF_TYPE_Q8_0,
    Type.BF16: GgufType.GGUF_TYPE_BF16,
    Type.F16: GgufType.GGUF_TYPE_F16,
}


def download(
    project: Project,
    checkpoint: Annotated[
        str, typer.Argument(metavar="RUN[/STEP]", help="Run, and step; the newest run's best one if left out.")
    ] = "latest",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; made when it is not there.")] = Path(
        "adapter"
    ),
    format: Annotated[
        Format, typer.Option(help="The adapter alone, a whole model for transformers, or one file for llama.cpp.")
    ] = Format.PEFT,
    gguf_type: Annotated[Type, typer.Option(help="Type of the matrices in a GGUF file.")] = Type.Q8_0,
    force: Annotated[bool, typer.Option("--force", help="Replace files of the same names in the folder.")] = False,
    json: Json = False,
) -> None:
    """Download an adapter: as PEFT reads it, merged into its base model, or that as GGUF. Digests are verified.

    Examples: codegraft train download -p acme -o adapter

    codegraft train download r-0abc/120 -p acme -o model --format merged

    codegraft train download -p acme -o gguf --format gguf --gguf-type bf16
    """
    with connect() as client, JobBar("download") as bar:
        name = _checkpoint(client, checkpoint, project)
        header = client.adapters.download(
            name,
            output,
            format=_FORMATS[format],
            gguf_type=_TYPES[gguf_type],
            overwrite=force,
            on_progress=bar.show_progress,
        )
    if json:
        print_json({"checkpoint": header.checkpoint, "sha256": header.sha256, "files": [*header.files]})
        return
    for file in header.files:
        err.print(f"{output / file.path}  {file.size:,} bytes, sha256 {file.sha256[:12]}")
    err.print(f"wrote {header.checkpoint}, version {header.sha256[:12]}")


def upload(
    project: Project,
    folder: Annotated[Path, typer.Argument(help="Folder with adapter_model.safetensors and adapter_config.json.")],
    model: Annotated[
        str, typer.Option(help="Base model that it was trained on; the trainer's default if left out.")
    ] = "",
    title: Annotated[str, typer.Option(help="Title for people.")] = "",
    json: Json = False,
) -> None:
    """Upload an adapter that was trained elsewhere (PEFT format). It is checked against its base model first.

    It becomes a run with one checkpoint, 0. Nobody measured it here, so it serves only where it is pinned.

    Example: codegraft train upload ./adapter -p acme --model qwen2.5-coder-1.5b --title "from the cluster"
    """
    with connect() as client:
        run = client.adapters.upload(project, folder, base_model=model, title=title)
    checkpoint = f"{run.name}/checkpoints/0"
    if json:
        print_json({"run": run, "checkpoint": checkpoint})
        return
    err.print(f"{run.name}: its adapter on {run.base_model} is {checkpoint}")
    err.print(f"serve it with: codegraft serve set {id_of(run.name)}/0 --project {project}")


def _checkpoint(client: Codegraft, text: str, project: str) -> str:
    """The full name of what ``RUN[/STEP]`` or a full name says; without a step the best one, or the only one."""
    if "/checkpoints/" in text:
        names.parse(names.CHECKPOINT, text)
        return text
    run_id, _, step = (text, "", "") if text.startswith("projects/") else text.partition("/")
    run = client.runs.get(full_name(names.RUN, run_id, project))
    if step:
        names.parse(names.CHECKPOINT, name := f"{run.name}/checkpoints/{step}")
        return name
    if run.best_checkpoint:
        return run.best_checkpoint
    found = list(client.runs.checkpoints(run.name))
    if len(found) == 1:
        return found[0].name
    raise CheckpointNotFound(
        f"{run.name} has no checkpoint that beats the base model",
        field="name",
        hint=f"Name a step: {', '.join(f'{id_of(run.name)}/{c.step}' for c in found[-5:]) or 'it has none yet'}.",
    )
