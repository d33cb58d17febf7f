"""``codegraft source``: where a project's code comes from."""

from __future__ import annotations

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from codegraft.common.v1.split_pb2 import Split
from codegraft.ingest.v1 import source_pb2
from services.cli.bundle import has_changes, make_bundle
from services.cli.connect import Project, connect, full_name, id_of
from services.cli.output import Json, err, print_json, print_table
from services.cli.progress import JobBar
from services.client import Codegraft
from services.core import names
from services.core.errors import InvalidArgument, by_reason

app = typer.Typer(help="Sources: where a project's code comes from.", no_args_is_help=True)

SourceId = Annotated[str, typer.Argument(metavar="SOURCE", help="Id or full name of the source.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until its files are fetched.")]


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


@app.command()
def add(
    project: Project,
    git: Annotated[str, typer.Option(help="Git repository: a URL, or a local folder (travels as a bundle).")] = "",
    archive: Annotated[Path | None, typer.Option(help="Archive to upload: zip or tar, also compressed.")] = None,
    file: Annotated[Path | None, typer.Option(help="Single file to upload.")] = None,
    url: Annotated[str, typer.Option(help="https URL of an archive or file.")] = "",
    source_id: Annotated[str, typer.Option("--id", help="Id of the source; chosen by the service if left out.")] = "",
    split: Annotated[SplitChoice, typer.Option(help="Part of the dataset: test files are never trained on.")] = (
        SplitChoice.AUTO
    ),
    test: Annotated[
        list[str] | None, typer.Option(help="Mask of files that are test files whatever --split says.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Mask of files to leave out, in .gitignore syntax.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Leave out files that match none of these masks.")] = None,
    ref: Annotated[str, typer.Option(help="Git: branch, tag or commit; HEAD if left out.")] = "",
    subpath: Annotated[str, typer.Option(help="Only files below this folder of the repository or archive.")] = "",
    wait: Wait = True,
    json: Json = False,
) -> None:
    """Add one source: exactly one of --git, --archive, --file and --url.

    Codegraft never runs code from a source. Uncommitted changes of a local repository do not travel.

    Examples: codegraft source add -p acme --git . --test 'tests/**'

    codegraft source add -p acme --archive lib-1.0.tar.gz --subpath lib-1.0/src

    codegraft source add -p acme --file held_out.py --split test
    """
    if sum(map(bool, (git, archive, file, url))) != 1:
        raise typer.BadParameter("give exactly one of --git, --archive, --file and --url")
    source = source_pb2.Source(
        split=SPLITS[split],
        split_rules=[source_pb2.SplitRule(pattern=mask, split=Split.SPLIT_TEST) for mask in test or ()],
        exclude=exclude or (),
        include=include or (),
    )
    with connect() as client:
        if git and Path(git).is_dir():
            upload = _upload_bundle(client, project, Path(git), ref)
            source.bundle.CopyFrom(source_pb2.BundleSource(upload=upload, ref=ref, subpath=subpath))
        elif git:
            source.git.CopyFrom(source_pb2.GitSource(url=git, ref=ref, subpath=subpath))
        elif archive:
            source.archive.CopyFrom(
                source_pb2.ArchiveSource(upload=client.sources.upload(project, archive).name, subpath=subpath)
            )
        elif file:
            source.file.CopyFrom(
                source_pb2.FileSource(upload=client.sources.upload(project, file).name, path=file.name)
            )
        else:
            source.url.CopyFrom(source_pb2.UrlSource(url=url))
        added = client.sources.add(project, source, source_id=source_id)
        if wait:
            added = _fetched(client, added.name)
    _tell(added, "added", json)


def _upload_bundle(client: Codegraft, project: str, repository: Path, ref: str) -> str:
    if has_changes(repository):
        err.print(f"note: {repository} has uncommitted changes; they are left out")
    with tempfile.TemporaryDirectory(prefix="codegraft-") as folder:
        bundle = Path(folder, f"{repository.resolve().name or 'repository'}.bundle")
        make_bundle(repository, bundle, ref=ref)
        return client.sources.upload(project, bundle).name


def _fetched(client: Codegraft, name: str) -> source_pb2.Source:
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


def _tell(source: source_pb2.Source, what: str, as_json: bool) -> None:
    if as_json:
        print_json(source)
    elif source.state == source_pb2.SOURCE_STATE_READY:
        err.print(f"{what} {source.name}: {source.file_count:,} files, {source.byte_count:,} bytes")
        for why, count in sorted(source.skipped.items()):
            err.print(f"  left out: {count:,} ({why})")
    else:
        err.print(f"{what} {source.name}; it is fetched in the background")


@app.command("list")
def list_(project: Project, json: Json = False) -> None:
    """List the sources of a project."""
    with connect() as client:
        sources = list(client.sources.list(project))
    if json:
        print_json(sources)
        return
    rows = [
        [
            id_of(source.name),
            source.WhichOneof("origin"),
            Split.Name(source.split).removeprefix("SPLIT_").lower(),
            source_pb2.SourceState.Name(source.state).removeprefix("SOURCE_STATE_").lower(),
            source.file_count,
            source.byte_count,
            source.commit[:12] or source.failure.message,
        ]
        for source in sources
    ]
    columns = ["SOURCE", "KIND", "SPLIT", "STATE", "FILES", "BYTES", "COMMIT OR FAILURE"]
    print_table(columns, rows, empty=f"no source yet: codegraft source add --project {project} --git FOLDER")


@app.command()
def sync(project: Project, source: SourceId, wait: Wait = True, json: Json = False) -> None:
    """Fetch a source again."""
    with connect() as client:
        synced = client.sources.sync(full_name(names.SOURCE, source, project))
        if wait:
            synced = _fetched(client, synced.name)
    _tell(synced, "synced", json)


@app.command()
def remove(project: Project, source: SourceId, json: Json = False) -> None:
    """Remove a source; existing snapshots keep its files."""
    name = full_name(names.SOURCE, source, project)
    with connect() as client:
        client.sources.remove(name)
    if json:
        print_json({"removed": name})
    else:
        err.print(f"removed {name}")
