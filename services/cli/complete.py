"""``codegraft complete``: code between a prefix and a suffix, as it is generated."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from codegraft.inference.v1 import completion_pb2
from services.cli import location
from services.cli.connect import Project, connect, full_name, id_of
from services.cli.output import Json, err, print_json
from services.client import Piece
from services.core import names
from services.core.errors import EmptyPrompt


def complete(
    project: Project,
    place: Annotated[
        str, typer.Argument(metavar="[FILE:LINE[:COLUMN]]", help="The cursor; at the end of the line without COLUMN.")
    ] = "",
    prefix: Annotated[str, typer.Option(help="Text before the cursor.")] = "",
    suffix: Annotated[str, typer.Option(help="Text after the cursor.")] = "",
    prefix_file: Annotated[
        Path | None, typer.Option(help="File with the text before the cursor; - reads stdin.")
    ] = None,
    suffix_file: Annotated[Path | None, typer.Option(help="File with the text after the cursor.")] = None,
    path: Annotated[str, typer.Option(help="Path of the file in its repository.", show_default="FILE")] = "",
    max_tokens: Annotated[int | None, typer.Option(help="At most this many new tokens.")] = None,
    single_line: Annotated[bool, typer.Option("--single-line", help="Stop at the end of the line.")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus of this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same completion.")] = None,
    adapter: Annotated[
        str, typer.Option(metavar="base|RUN/STEP", help="Version that answers; the project's policy if left out.")
    ] = "",
    json: Json = False,
) -> None:
    """Complete code: stream the new text to stdout; with --json every message on a line of its own.

    Examples: codegraft complete -p acme src/app.py:40

    codegraft complete -p acme --prefix 'def main(' --path app.py --adapter base
    """
    if place:
        cursor = location.read(place)
        prefix, suffix, path = cursor.prefix, cursor.suffix, path or cursor.path
    if prefix_file:
        prefix = sys.stdin.read() if str(prefix_file) == "-" else location.read_text(prefix_file)
        path = path or ("" if str(prefix_file) == "-" else str(prefix_file))
    if suffix_file:
        suffix = location.read_text(suffix_file)
    if not prefix and not suffix:
        raise EmptyPrompt("there is nothing to complete", field="prompt", hint="Give FILE:LINE, --prefix or --suffix.")
    with connect() as client:
        pieces = client.completions.complete(
            project,
            prefix=prefix,
            suffix=suffix,
            path=path,
            max_tokens=max_tokens,
            single_line=single_line,
            stop=stop or (),
            sampling=completion_pb2.Sampling(temperature=temperature, top_p=top_p, seed=seed),
            adapter=_choice(adapter, project),
        )
        for line in show(pieces, json):
            err.print(line, style="dim")


def show(pieces: Iterable[Piece], as_json: bool) -> Iterator[str]:
    """Writes a completion to stdout as it arrives; yields the closing line for people."""
    started = completion_pb2.Started()
    for piece in pieces:
        started = piece.started or started
        if as_json:
            print_json({"text": piece.text, "started": piece.started, "finished": piece.finished})
        elif piece.finished:
            sys.stdout.write("\n")
            sys.stdout.flush()
            yield _summary(started, piece.finished)
        else:
            sys.stdout.write(piece.text)
            sys.stdout.flush()


def _choice(adapter: str, project: str) -> completion_pb2.AdapterChoice:
    if not adapter:
        return completion_pb2.AdapterChoice()
    if adapter == "base":
        return completion_pb2.AdapterChoice(base=True)
    if adapter.startswith("projects/"):
        names.parse(names.CHECKPOINT, adapter, field="adapter")
        return completion_pb2.AdapterChoice(checkpoint=adapter)
    run, _, step = adapter.partition("/")
    if not step:
        raise typer.BadParameter("give base or RUN/STEP", param_hint="--adapter")
    return completion_pb2.AdapterChoice(checkpoint=f"{full_name(names.RUN, run, project)}/checkpoints/{step}")


def _summary(started: completion_pb2.Started, finished: completion_pb2.Finished) -> str:
    version = (
        f"{started.checkpoint.partition('/runs/')[2].replace('checkpoints/', '')}" if started.checkpoint else "base"
    )
    reason = completion_pb2.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower().replace("_", " ")
    tokens, seconds = finished.usage.completion_tokens, finished.timings.total_seconds
    return f"{id_of(started.model)}, {version}: {tokens} tokens in {seconds:.2f} s, ended by {reason}"
