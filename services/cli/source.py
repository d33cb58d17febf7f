"""``codegraft source``: where a project's code comes from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from codegraft.common.v1.split_pb2 import Split
from codegraft.ingest.v1 import source_pb2
from services.cli import source_change
from services.cli.connect import Project, connect, full_name, id_of
from services.cli.output import Follow, Json, err, print_changes, print_json, print_table
from services.cli.source_parts import (
    SPLITS,
    Gitattributes,
    SourceId,
    SplitChoice,
    Test,
    Train,
    Wait,
    fetched,
    seconds_of,
    split_rules,
    tell,
    upload_bundle,
)
from services.core import names

app = typer.Typer(help="Sources: where a project's code comes from.", no_args_is_help=True)


@app.command()
def add(
    project: Project,
    git: Annotated[str, typer.Option(help="Git repository: a URL, or a local folder (travels as a bundle).")] = "",
    archive: Annotated[Path | None, typer.Option(help="Archive to upload: zip or tar, also compressed.")] = None,
    file: Annotated[Path | None, typer.Option(help="Single file to upload.")] = None,
    url: Annotated[str, typer.Option(help="https URL of an archive or file.")] = "",
    sha256: Annotated[str, typer.Option(help="URL: SHA-256 that it must have.")] = "",
    source_id: Annotated[str, typer.Option("--id", help="Id of the source; chosen by the service if left out.")] = "",
    split: Annotated[SplitChoice, typer.Option(help="Part of the dataset: test files are never trained on.")] = (
        SplitChoice.AUTO
    ),
    test: Test = None,
    train: Train = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Mask of files to leave out, in .gitignore syntax.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Leave out files that match none of these masks.")] = None,
    ref: Annotated[str, typer.Option(help="Git: branch, tag or commit; HEAD if left out.")] = "",
    subpath: Annotated[str, typer.Option(help="Only files below this folder of the repository or archive.")] = "",
    credential: Annotated[str, typer.Option(help="Git URL: credential of a private repository.")] = "",
    submodules: Annotated[bool, typer.Option("--submodules", help="Git URL: fetch submodules too.")] = False,
    gitattributes: Annotated[bool, Gitattributes] = False,
    every: Annotated[str, typer.Option(help="Sync on a schedule: 15m, 6h, 1d …")] = "",
    wait: Wait = True,
    json: Json = False,
) -> None:
    """Add one source: exactly one of --git, --archive, --file and --url.

    Codegraft never runs code from a source. Uncommitted changes of a local repository do not travel.

    Examples: codegraft source add -p acme --git . --test 'tests/**'

    codegraft source add -p acme --archive lib-1.0.tar.gz --subpath lib-1.0/src

    codegraft source add -p acme --file held_out.py --split test

    codegraft source add -p acme --git git@git.corp.example:team/app.git --credential deploy-key --every 1h
    """
    if sum(map(bool, (git, archive, file, url))) != 1:
        raise typer.BadParameter("give exactly one of --git, --archive, --file and --url")
    source = source_pb2.Source(
        split=SPLITS[split],
        split_rules=split_rules(test or (), train or ()),
        exclude=exclude or (),
        include=include or (),
        honour_gitattributes=gitattributes,
        sync_interval_seconds=seconds_of(every),
    )
    with connect() as client:
        if git and Path(git).is_dir():
            upload = upload_bundle(client, project, Path(git), ref)
            source.bundle.CopyFrom(source_pb2.BundleSource(upload=upload, ref=ref, subpath=subpath))
        elif git:
            opener = full_name(names.CREDENTIAL, credential, project) if credential else ""
            source.git.CopyFrom(
                source_pb2.GitSource(url=git, ref=ref, subpath=subpath, credential=opener, submodules=submodules)
            )
        elif archive:
            source.archive.CopyFrom(
                source_pb2.ArchiveSource(upload=client.sources.upload(project, archive).name, subpath=subpath)
            )
        elif file:
            source.file.CopyFrom(
                source_pb2.FileSource(upload=client.sources.upload(project, file).name, path=file.name)
            )
        else:
            source.url.CopyFrom(source_pb2.UrlSource(url=url, sha256=sha256))
        added = client.sources.add(project, source, source_id=source_id)
        if wait:
            added = fetched(client, added.name)
    tell(added, "added", json)


@app.command("list")
def list_(project: Project, follow: Follow = False, json: Json = False) -> None:
    """List the sources of a project; with --follow each of them, then every change, a line each."""
    with connect() as client:
        if follow:
            print_changes(client.sources.watch_all(project), _change, as_json=json)
            return
        sources = list(client.sources.list(project))
    if json:
        print_json(sources)
        return
    columns = ["SOURCE", "KIND", "SPLIT", "STATE", "FILES", "BYTES", "COMMIT OR FAILURE"]
    empty = f"no source yet: codegraft source add --project {project} --git FOLDER"
    print_table(columns, map(_row, sources), empty=empty)


def _row(source: source_pb2.Source) -> list[object]:
    return [
        id_of(source.name),
        source.WhichOneof("origin"),
        Split.Name(source.split).removeprefix("SPLIT_").lower(),
        source_pb2.SourceState.Name(source.state).removeprefix("SOURCE_STATE_").lower(),
        source.file_count,
        source.byte_count,
        source.commit[:12] or source.failure.message,
    ]


def _change(message: source_pb2.WatchSourcesResponse) -> list[object]:
    return _row(message.source) if message.HasField("source") else [id_of(message.removed), "removed"]


@app.command()
def sync(project: Project, source: SourceId, wait: Wait = True, json: Json = False) -> None:
    """Fetch a source again; when its files changed, a snapshot is taken.

    A local folder that was added travels again with: codegraft source update SOURCE --git FOLDER
    """
    with connect() as client:
        synced = client.sources.sync(full_name(names.SOURCE, source, project))
        if wait:
            synced = fetched(client, synced.name)
    tell(synced, "synced", json)


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


@app.command()
def show(project: Project, source: SourceId, follow: Follow = False, json: Json = False) -> None:
    """Show where a source stands: state and why, files, bytes, commit, last sync; with --follow also every change."""
    name = full_name(names.SOURCE, source, project)
    with connect() as client:
        for found in client.sources.watch(name) if follow else [client.sources.get(name)]:
            if json:
                print_json(found)
            else:
                print_table(["FIELD", "VALUE"], list(_facts(found)), empty="")


app.command()(source_change.update)
app.command()(source_change.watch)


@app.command()
def forget(
    project: Project,
    source: SourceId,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Remove a source everywhere: also every snapshot that has its files.

    The bytes go with the next `codegraft snapshot gc`. Datasets that hold some of its files are listed, and stay.
    """
    name = full_name(names.SOURCE, source, project)
    if not yes and not json:
        typer.confirm(f"Remove {name} and every snapshot with its files?", abort=True, err=True)
    with connect() as client:
        forgotten = client.sources.forget(name)
    if json:
        print_json(forgotten)
        return
    err.print(f"forgot {name} and {len(forgotten.snapshots)} snapshots with its files")
    for dataset in forgotten.datasets:
        err.print(f"  {dataset} still holds some of them")


def _facts(source: source_pb2.Source) -> Iterator[tuple[str, object]]:
    yield "source", source.name
    kind = source.WhichOneof("origin") or ""
    origin = getattr(source, kind)
    yield "origin", f"{kind} {getattr(origin, 'url', '') or getattr(origin, 'upload', '')}"
    yield "state", source_pb2.SourceState.Name(source.state).removeprefix("SOURCE_STATE_").lower()
    if source.progress.message:
        of = f" of {source.progress.total:,}" if source.progress.total else ""
        yield "progress", f"{source.progress.message}: {source.progress.done:,}{of} {source.progress.unit}"
    if source.failure.reason:
        yield "failure", f"{source.failure.reason}: {source.failure.message}"
        yield "hint", source.failure.hint
    yield "files", source.file_count
    yield "bytes", source.byte_count
    for why, count in sorted(source.skipped.items()):
        yield "left out", f"{count:,} ({why})"
    if source.commit:
        yield "commit", source.commit
    if source.HasField("sync_time"):
        yield "last sync (UTC)", source.sync_time.ToDatetime().isoformat(" ", "seconds")
    if source.sync_interval_seconds:
        yield "synced every", f"{source.sync_interval_seconds:,} s"
    if source.snapshot:
        yield "snapshot", source.snapshot
