"""``codegraft snapshot``: all sources of a project at one moment."""

from __future__ import annotations

from typing import Annotated

import typer

from codegraft.ingest.v1 import snapshot_pb2
from services.cli.connect import Project, connect, full_name, id_of
from services.cli.output import Json, err, print_json, print_table
from services.core import names

app = typer.Typer(help="Snapshots: all sources of a project at one moment, immutable.", no_args_is_help=True)

SnapshotId = Annotated[str, typer.Argument(metavar="SNAPSHOT", help='Id, full name, or "latest".')]


@app.command()
def take(project: Project, json: Json = False) -> None:
    """Take a snapshot of every source that has files; the same content gives the same snapshot."""
    with connect() as client:
        taken = client.snapshots.create(project)
    if json:
        print_json(taken)
    else:
        err.print(f"{taken.name}: {taken.file_count:,} files, {taken.byte_count:,} bytes")


@app.command("list")
def list_(project: Project, json: Json = False) -> None:
    """List the snapshots of a project, newest first."""
    with connect() as client:
        found = list(client.snapshots.list(project))
    if json:
        print_json(found)
        return
    rows = [
        [
            id_of(one.name),
            one.file_count,
            one.byte_count,
            len(one.sources),
            one.create_time.ToDatetime().isoformat(" ", "seconds"),
        ]
        for one in found
    ]
    columns = ["SNAPSHOT", "FILES", "BYTES", "SOURCES", "TAKEN (UTC)"]
    print_table(columns, rows, empty=f"no snapshot yet: codegraft snapshot take --project {project}")


@app.command()
def files(
    project: Project,
    snapshot: SnapshotId = "latest",
    limit: Annotated[int, typer.Option(min=1, help="At most this many.")] = 1000,
    json: Json = False,
) -> None:
    """List the files of a snapshot."""
    with connect() as client:
        name = client.snapshots.get(full_name(names.SNAPSHOT, snapshot, project)).name
        found = [file for file, _ in zip(client.snapshots.files(name), range(limit), strict=False)]
    if json:
        print_json(found)
        return
    rows = [[id_of(file.source), file.path, file.size, file.sha256[:12]] for file in found]
    print_table(["SOURCE", "PATH", "BYTES", "SHA-256"], rows, empty="it has no file")


@app.command()
def diff(
    project: Project,
    base: Annotated[str, typer.Argument(help="The older one.")],
    target: Annotated[str, typer.Argument(help="The newer one.")] = "latest",
    json: Json = False,
) -> None:
    """Show which files changed from one snapshot to another."""
    with connect() as client:
        older, newer = (full_name(names.SNAPSHOT, one, project) for one in (base, target))
        found = list(client.snapshots.diff(older, newer))
    if json:
        print_json(found)
        return
    rows = []
    for one in found:
        file = one.after if one.HasField("after") else one.before
        word = snapshot_pb2.FileChange.Name(one.change).removeprefix("FILE_CHANGE_").lower()
        rows.append([word, id_of(file.source), file.path, one.after.size - one.before.size])
    print_table(["CHANGE", "SOURCE", "PATH", "BYTES MORE"], rows, empty="nothing changed")


@app.command()
def delete(project: Project, snapshot: SnapshotId, json: Json = False) -> None:
    """Delete a snapshot that no dataset was made of."""
    name = full_name(names.SNAPSHOT, snapshot, project)
    with connect() as client:
        client.snapshots.delete(name)
    if json:
        print_json({"deleted": name})
    else:
        err.print(f"deleted {name}")


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only count what would be removed.")] = False,
    hours: Annotated[float, typer.Option(min=1, help="Keep what was written within this many hours.")] = 24,
    json: Json = False,
) -> None:
    """Remove from the object store what no source, snapshot, dataset or run refers to, of all projects."""
    counts = snapshot_pb2.CollectGarbageResponse()
    with connect() as client:
        for counts in client.snapshots.collect_garbage(dry_run=dry_run, min_age_seconds=round(hours * 3600)):
            if not json and not counts.done and err.is_terminal:
                err.print(f"looked at {counts.examined:,} objects", end="\r")
    if json:
        print_json(counts)
        return
    word = "would be removed" if dry_run else "removed"
    err.print(f"{counts.removed:,} objects ({counts.removed_bytes:,} bytes) {word}")
    err.print(f"kept: {counts.kept:,} in use, {counts.young:,} younger than {hours:g} h")
