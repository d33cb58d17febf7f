"""``codegraft complete``: code between a prefix and a suffix, as it is generated."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from codegraft.inference.v1 import completion_pb2
from services.cli import completed, location
from services.cli.connect import Project, connect, full_name
from services.cli.output import Json, print_json
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
    language: Annotated[str, typer.Option(help="Language of text without a path, as in Python.")] = "",
    max_tokens: Annotated[int | None, typer.Option(help="At most this many new tokens.")] = None,
    single_line: Annotated[
        bool, typer.Option("--single-line", help="Stop at the end of the first non-empty line.")
    ] = False,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus of this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same completion.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="So many completions of the prompt, 1 to 8.")] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="Log-probability of every token, and so many of the likeliest, 0 to 20.")
    ] = None,
    adapter: Annotated[
        str, typer.Option(metavar="base|RUN/STEP", help="Version that answers; the project's policy if left out.")
    ] = "",
    json: Json = False,
) -> None:
    """Complete code: stream the new text to stdout; with --json every message on a line of its own.

    Several completions (--n) are printed one below the other, each once it is whole; without --temperature they are all
    alike. With --logprobs a table of the tokens follows each.

    Examples: codegraft complete -p acme src/app.py:40

    codegraft complete -p acme --prefix 'def main(' --path app.py --adapter base

    codegraft complete -p acme src/app.py:40 --n 3 --temperature 0.8 --logprobs 2
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
            language=language,
            max_tokens=max_tokens,
            single_line=single_line,
            stop=stop or (),
            sampling=completion_pb2.Sampling(temperature=temperature, top_p=top_p, seed=seed, n=n, logprobs=logprobs),
            adapter=_choice(adapter, project),
        )
        if json:
            for piece in pieces:
                print_json(completed.as_json(piece))
        elif (n or 1) == 1 and logprobs is None:
            completed.stream(pieces)
        else:
            completed.one_by_one(pieces, headed=(n or 1) > 1)


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
