"""``codegraft audit``: who changed what."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToDict

from codegraft.access.v1 import audit_pb2
from services.cli.connect import connect
from services.cli.key import duration
from services.cli.output import Json, out, print_json, print_table


def audit(
    project: Annotated[
        str, typer.Option("--project", "-p", help="One project; all, and what is no project's, without.")
    ] = "-",
    since: Annotated[str, typer.Option(help="How far back: 7d, 12h, 30m.")] = "7d",
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the oldest first.")] = 1000,
    changes: Annotated[bool, typer.Option("--changes", help="Show what was stored before and after.")] = False,
    json: Json = False,
) -> None:
    """List the calls that changed something, or tried to: when, who, what, how it ended. For operators.

    With --json one record a line, with what was stored before and after.
    Example: codegraft audit -p acme --since 2d --changes
    """
    with connect() as client:
        found = client.audit.list(project, since=datetime.now(UTC) - duration(since, "--since"))
        records = list(itertools.islice(found, limit))
    if json:
        for record in records:
            print_json(record)
        return
    rows = [
        [
            f"{record.time.ToDatetime():%Y-%m-%d %H:%M:%S}",
            record.caller,
            record.method.rpartition("/")[2],
            ", ".join(record.resources or [change.name for change in record.changes][:3]),
            record.reason or record.code,
        ]
        for record in records
    ]
    if not changes:
        print_table(["TIME (UTC)", "WHO", "WHAT", "OF", "RESULT"], rows, empty="nothing was changed in that time")
        return
    for record, row in zip(records, rows, strict=True):
        out.print("  ".join(row))
        for change in record.changes:
            for line in difference(change):
                out.print(f"    {line}")


def difference(change: audit_pb2.AuditChange) -> list[str]:
    """The fields that differ, one a line: name, what was there before, what after."""
    before, after = (MessageToDict(each) for each in (change.before, change.after))
    fields = sorted(before.keys() | after.keys())
    differing = [name for name in fields if before.get(name) != after.get(name)]
    return [f"{change.name} {name}: {before.get(name, '-')} -> {after.get(name, '-')}" for name in differing]
