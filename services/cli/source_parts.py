"""What commands about sources share: options, an upload of a local repository, the wait for a fetch."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from codegraft.common.v1.split_pb2 import Split
from codegraft.ingest.v1 import source_pb2
from services.cli.bundle import has_changes, make_bundle
from services.cli.connect import id_of
from services.cli.output import err, print_json
from services.cli.progress import JobBar
from services.client import Codegraft
from services.core.errors import InvalidArgument, by_reason

SourceId = Annotated[str, typer.Argument(metavar="SOURCE", help="Id or full name of the source.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until its files are fetched.")]
Test = Annotated[
    list[str] | None, typer.Option(help="Mask of files that are test files whatever --split says.", show_default=False)
]
Train = Annotated[
    list[str] | None, typer.Option(help="Mask of files that are train files whatever --split says.", show_default=False)
]
Gitattributes = typer.Option(
    "--gitattributes/--no-gitattributes", help="Heed linguist's marks in its .gitattributes.", show_default=False
)


class SplitChoice(StrEnum):
    """Which part of the dataset a source's files belong to."""

    TRAIN = "train"
    TEST = "test"
    AUTO = "auto"


SPLITS = {
    SplitChoice.TRAIN: Split.SPLIT_TRAIN,
    SplitChoice.TEST: Split.SPLIT_TEST,
    SplitChoice.AUTO: Split.SPLIT_AUTO,
}


def split_rules(test: Sequence[str], train: Sequence[str]) -> list[source_pb2.SplitRule]:
    """The exceptions to a source's split; empty masks, which a shell writes as '', are none."""
    masks = [(mask, Split.SPLIT_TEST) for mask in test] + [(mask, Split.SPLIT_TRAIN) for mask in train]
    return [source_pb2.SplitRule(pattern=mask, split=part) for mask, part in masks if mask]


def upload_bundle(client: Codegraft, project: str, repository: Path, ref: str) -> str:
    if has_changes(repository):
        err.print(f"note: {repository} has uncommitted changes; they are left out")
    with tempfile.TemporaryDirectory(prefix="codegraft-") as folder:
        bundle = Path(folder, f"{repository.resolve().name or 'repository'}.bundle")
        make_bundle(repository, bundle, ref=ref)
        return client.sources.upload(project, bundle).name


def fetched(client: Codegraft, name: str) -> source_pb2.Source:
    """Follows the fetch to its end, with a bar."""
    with JobBar(f"fetch {id_of(name)}") as bar:
        for source in client.sources.watch(name):
            bar.show_progress(source.progress)
            if source.fetched_generation < source.generation:
                continue
            if source.state == source_pb2.SOURCE_STATE_FAILED:
                raise by_reason(source.failure.reason)(source.failure.message, hint=source.failure.hint)
            if source.state == source_pb2.SOURCE_STATE_READY:
                return source
    raise InvalidArgument(f"{name} was removed meanwhile", field="source")


def tell(source: source_pb2.Source, what: str, as_json: bool) -> None:
    if as_json:
        print_json(source)
    elif source.state == source_pb2.SOURCE_STATE_READY:
        err.print(f"{what} {source.name}: {source.file_count:,} files, {source.byte_count:,} bytes")
        if source.commit:
            err.print(f"  commit {source.commit[:12]}; {source.stored_bytes:,} bytes were new")
        for why, count in sorted(source.skipped.items()):
            err.print(f"  left out: {count:,} ({why})")
        if source.snapshot:
            err.print(f"  took {source.snapshot}")
    else:
        err.print(f"{what} {source.name}; it is fetched in the background")


def seconds_of(text: str) -> int:
    """Seconds of "90", "15m", "6h" or "2d"; 0 for nothing, "0" and "off".

    Raises:
        InvalidArgument: it is none of these.
    """
    if text in ("", "0", "off"):
        return 0
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number, unit = (text[:-1], units[text[-1]]) if text[-1] in units else (text, 1)
    if not number.isdecimal():
        raise InvalidArgument(f"{text!r} is no interval", field="every", hint="Write 90s, 15m, 6h or 1d.")
    return int(number) * unit
