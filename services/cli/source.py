"""``codegraft source``: where a project's code comes from."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
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
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on with every change, until Ctrl-C.")]
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
    credential: Annotated[str, typer.Option(help="Git URL: credential of a private repository.")] = "",
    submodules: Annotated[bool, typer.Option("--submodules", help="Git URL: fetch submodules too.")] = False,
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
        split_rules=[source_pb2.SplitRule(pattern=mask, split=Split.SPLIT_TEST) for mask in test or ()],
        exclude=exclude or (),
        include=include or (),
        sync_interval_seconds=seconds_of(every),
    )
    with connect() as client:
        if git and Path(git).is_dir():
            upload = _upload_bundle(client, project, Path(git), ref)
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
        if source.commit:
            err.print(f"  commit {source.commit[:12]}; {source.stored_bytes:,} bytes were new")
        for why, count in sorted(source.skipped.items()):
            err.print(f"  left out: {count:,} ({why})")
        if source.snapshot:
            err.print(f"  took {source.snapshot}")
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
    """Fetch a source again; when its files changed, a snapshot is taken.

    A local folder that was added travels again with: codegraft source update SOURCE --git FOLDER
    """
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


@app.command()
def update(
    project: Project,
    source: SourceId,
    git: Annotated[str, typer.Option(help="Local git folder or new URL of a git source.")] = "",
    archive: Annotated[Path | None, typer.Option(help="New archive.")] = None,
    file: Annotated[Path | None, typer.Option(help="New content of a single file.")] = None,
    ref: Annotated[str | None, typer.Option(help="Git: another branch, tag or commit.")] = None,
    credential: Annotated[str | None, typer.Option(help="Git URL: another credential; empty for none.")] = None,
    split: Annotated[SplitChoice | None, typer.Option(help="Part of the dataset.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="New masks of files to leave out.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="New include masks.")] = None,
    wait: Wait = True,
    json: Json = False,
) -> None:
    """Change a source. A new content or ref is fetched at once, and only what differs is stored.

    Example: codegraft source update app -p acme --git ~/src/app
    """
    name = full_name(names.SOURCE, source, project)
    with connect() as client:
        record = client.sources.get(name)
        if git and Path(git).is_dir():
            record.bundle.upload = _upload_bundle(client, project, Path(git), ref or record.bundle.ref)
        elif git:
            record.git.url = git
        if archive:
            record.archive.upload = client.sources.upload(project, archive).name
        if file:
            record.file.upload = client.sources.upload(project, file).name
        if ref is not None:
            (record.bundle if record.WhichOneof("origin") == "bundle" else record.git).ref = ref
        if credential is not None:
            record.git.credential = full_name(names.CREDENTIAL, credential, project) if credential else ""
        if split is not None:
            record.split = SPLITS[split]
        if exclude is not None:
            record.exclude[:] = exclude
        if include is not None:
            record.include[:] = include
        changed = client.sources.update(record)
        if wait:
            changed = _fetched(client, changed.name)
    _tell(changed, "updated", json)


@app.command()
def watch(
    project: Project,
    source: SourceId,
    every: Annotated[str, typer.Option(help="Interval: 15m, 6h, 1d …; 0 or off ends it.")] = "1h",
    json: Json = False,
) -> None:
    """Sync a source on a schedule; a snapshot is taken whenever its files changed.

    Example: codegraft source watch app -p acme --every 30m
    """
    name = full_name(names.SOURCE, source, project)
    with connect() as client:
        record = client.sources.get(name)
        record.ClearField(record.WhichOneof("origin") or "git")
        record.sync_interval_seconds = seconds_of(every)
        changed = client.sources.update(record)
    if json:
        print_json(changed)
    elif changed.sync_interval_seconds:
        err.print(f"{name} is synced every {changed.sync_interval_seconds:,} s")
    else:
        err.print(f"{name} is synced on demand only")


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
