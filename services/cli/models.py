"""``codegraft models``: the base models that can be fine-tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from codegraft.common.v1.job_pb2 import Progress
from codegraft.common.v1.model_pb2 import Model, ModelFunction
from services.cli.connect import connect
from services.cli.output import Json, err, out, print_json, print_table
from services.cli.progress import JobBar

app = typer.Typer(invoke_without_command=True)


@app.callback()
def models(context: typer.Context, json: Json = False) -> None:
    """Base models: list the catalogue (docs/models.md), then those in the object store.

    Any model of the Hugging Face Hub (hf:organisation/name) or folder of the services' machines (dir:/path) works too.

    Examples: codegraft models

    codegraft models show qwen2.5-coder-7b

    codegraft models push ./my-model my-model
    """
    if context.invoked_subcommand is not None:
        return
    with connect() as client:
        found = list(client.models.list())
    if json:
        print_json(found)
        return
    rows = [
        [
            model.id,
            model.title,
            model.parameters,
            model.context_length,
            _functions(model),
            gigabytes(model.serving_bytes),
            gigabytes(model.training_bytes),
            model.cached,
        ]
        for model in found
    ]
    columns = ["MODEL", "TITLE", "PARAMETERS", "CONTEXT", "FUNCTIONS", "SERVE GB", "TRAIN GB", "CACHED"]
    print_table(columns, rows, empty="no model")


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="Any model's id; the trainer's default if left out.")] = "",
    json: Json = False,
) -> None:
    """Show what is known of a model: tokens, LoRA targets, memory, licence, source."""
    with connect() as client:
        found = client.models.get(model)
    if json:
        print_json(found)
        return
    order = {"psm": "prefix, suffix, middle", "spm": "suffix, prefix, middle", "plain": "left to right only"}
    facts: list[tuple[str, object]] = [
        ("id", found.id),
        ("title", found.title),
        ("source", found.source),
        ("licence", found.licence),
        ("for", _functions(found)),
        ("parameters", found.parameters or None),
        ("context", found.context_length or None),
        ("prompts", order.get(found.fim_style, "told by its tokenizer")),
        ("fill-in-the-middle", " ".join(found.fim_tokens)),
        ("stops", " ".join(found.stop_tokens)),
        ("LoRA adapts", " ".join(found.lora_targets) or "every linear layer but the head"),
        ("to serve, GB", gigabytes(found.serving_bytes)),
        ("to train, GB", gigabytes(found.training_bytes)),
        ("in low memory mode", gigabytes(found.low_memory_training_bytes)),
        ("cached", found.cached),
    ]
    for name, value in facts:
        out.print(f"{name:20}{_text(value)}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder with config.json, tokenizer and *.safetensors.")],
    name: Annotated[str, typer.Argument(help="Name in the store: its id is then store:NAME.")],
    json: Json = False,
) -> None:
    """Put a model into the object store, from where every service fetches it: no Internet needed there.

    A model in the store never changes. Pushing the same folder again changes nothing.

    Example: codegraft models push ./Qwen2.5-Coder-1.5B qwen-1.5b
    """
    with connect() as client, JobBar(f"push {name}") as bar:
        total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))

        def tell(sent: int) -> None:
            bar.show_progress(Progress(done=sent, total=max(total, sent), unit="bytes", message="sending"))

        model = client.models.push(folder, name, on_progress=tell)
    if json:
        print_json(model)
    else:
        err.print(f"{model.id}: {model.parameters:,} parameters; use it with --model {model.id}")


def gigabytes(size: int) -> float | None:
    """10^9 bytes with one digit; None while unknown."""
    return round(size / 1e9, 1) if size else None


def _functions(model: Model) -> str:
    return ", ".join(
        ModelFunction.Name(f).removeprefix("MODEL_FUNCTION_").lower().replace("_", "-") for f in model.functions
    )


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "":
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)
