"""``codegraft source update`` and ``watch``: sources that are there already."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from codegraft.common.v1.split_pb2 import Split
from services.cli.connect import Project, connect, full_name
from services.cli.output import Json, err, print_json
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


def update(
    project: Project,
    source: SourceId,
    git: Annotated[str, typer.Option(help="Local git folder or new URL of a git source.")] = "",
    archive: Annotated[Path | None, typer.Option(help="New archive.")] = None,
    file: Annotated[Path | None, typer.Option(help="New content of a single file.")] = None,
    url: Annotated[str, typer.Option(help="New https URL of an archive or file.")] = "",
    sha256: Annotated[str | None, typer.Option(help="URL: SHA-256 that it must have; empty for any.")] = None,
    ref: Annotated[str | None, typer.Option(help="Git: another branch, tag or commit.")] = None,
    subpath: Annotated[str | None, typer.Option(help="Git or archive: only files below this folder.")] = None,
    credential: Annotated[str | None, typer.Option(help="Git URL: another credential; empty for none.")] = None,
    submodules: Annotated[
        bool | None, typer.Option("--submodules/--no-submodules", help="Git URL: fetch submodules too.")
    ] = None,
    split: Annotated[SplitChoice | None, typer.Option(help="Part of the dataset.")] = None,
    test: Test = None,
    train: Train = None,
    exclude: Annotated[list[str] | None, typer.Option(help="New masks of files to leave out; '' for none.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="New include masks; '' for none.")] = None,
    gitattributes: Annotated[bool | None, Gitattributes] = None,
    wait: Wait = True,
    json: Json = False,
) -> None:
    """Change what is given and leave the rest; a list is replaced as a whole.

    A new content, ref or folder is fetched at once, and only what differs is stored. The rest counts from the next
    snapshot on.

    Examples: codegraft source update app -p acme --git ~/src/app

    codegraft source update app -p acme --split test --exclude 'vendor/**'
    """
    name = full_name(names.SOURCE, source, project)
    with connect() as client:
        record = client.sources.get(name)
        kind = record.WhichOneof("origin") or "git"
        before = getattr(record, kind).SerializeToString()
        if git and Path(git).is_dir():
            record.bundle.upload = upload_bundle(client, project, Path(git), ref or record.bundle.ref)
        elif git:
            record.git.url = git
        if archive:
            record.archive.upload = client.sources.upload(project, archive).name
        if file:
            record.file.upload = client.sources.upload(project, file).name
        if url:
            record.url.url = url
        if sha256 is not None:
            record.url.sha256 = sha256
        if ref is not None:
            (record.bundle if kind == "bundle" else record.git).ref = ref
        if subpath is not None:
            folder = record.bundle if kind == "bundle" else record.archive if kind == "archive" else record.git
            folder.subpath = subpath
        if credential is not None:
            record.git.credential = full_name(names.CREDENTIAL, credential, project) if credential else ""
        if submodules is not None:
            record.git.submodules = submodules
        if split is not None:
            record.split = SPLITS[split]
        if test is not None or train is not None:
            was = {part: [r.pattern for r in record.split_rules if r.split == part] for part in SPLITS.values()}
            rules = split_rules(
                was[Split.SPLIT_TEST] if test is None else test, was[Split.SPLIT_TRAIN] if train is None else train
            )
            del record.split_rules[:]
            record.split_rules.extend(rules)
        for field, given in ((record.exclude, exclude), (record.include, include)):
            if given is not None:
                field[:] = [mask for mask in given if mask]
        if gitattributes is not None:
            record.honour_gitattributes = gitattributes
        if record.WhichOneof("origin") == kind and getattr(record, kind).SerializeToString() == before:
            record.ClearField(kind)  # a source that is told its origin is fetched again
        changed = client.sources.update(record)
        if wait:
            changed = fetched(client, changed.name)
    tell(changed, "updated", json)


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
