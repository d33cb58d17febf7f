"""``codegraft rebuild``: control state made anew from the manifests in the object store, after NATS lost everything."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from google.protobuf.message import Message

from codegraft.event.v1.events_pb2 import BestCheckpointChanged
from services.cli.control import manifests
from services.cli.control.backup import manifests_in
from services.cli.control.installation import Control, Installation, opened
from services.cli.control.manifests import Found, Rebuilt
from services.cli.output import Json, err, print_json, print_table
from services.cli.stack import Data
from services.core.errors import NotFound, ResourceExists
from services.core.events.nats import NatsBus
from services.core.state import Table

BEST = "codegraft.trainer.checkpoint.best.v1"
LOST = (
    "sources, their masks, splits and credentials: add them again (their last snapshot is there)",
    "API keys: those of the services' settings come back when ingest is restarted, make the others anew",
    "pinned, split and switched-off serving: every project serves its best checkpoint until codegraft serve set",
    "titles, plans, metrics and proofs of runs; runs and scans that had not stored anything yet, and what waited",
    "marks of kept checkpoints (codegraft train keep), counts of feedback, the audit log, dead letters",
)
_STORY = "RunEvent"


@dataclass(slots=True)
class Outcome:
    """What became of the records."""

    written: dict[str, int] = field(default_factory=dict)
    """By kind."""
    there: dict[str, int] = field(default_factory=dict)
    """Records that were there already and stay as they are, by kind."""


def rebuild(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would come back.")] = False,
    data: Data = None,
    json: Json = False,
) -> None:
    """Make projects, snapshots, datasets, scans, runs and checkpoints anew from the manifests in the object store.

    For when the state in NATS is lost and there is no backup (see codegraft backup), or only an old one: restore that
    first, then rebuild adds what is newer. Records that are there stay as they are, so it may be repeated, and services
    may run. Whatever no manifest tells is lost, and listed at the end. Inference serves the best checkpoints again
    within seconds.

    With a cluster, CODEGRAFT_NATS_REPLICAS=3 makes buckets that are not there yet with as many copies.

    Example: codegraft rebuild --dry-run
    """
    made, outcome = asyncio.run(_rebuild(Installation.find(data), dry_run=dry_run))
    if json:
        print_json(
            {
                "written": outcome.written,
                "there_already": outcome.there,
                "dry_run": dry_run,
                "lost": list(LOST),
                "lost_sources": [
                    {"name": one.source, "origin": one.origin, "commit": one.commit} for one in made.sources
                ],
                "unreadable": made.unreadable,
            }
        )
        return
    rows = [[kind, count, outcome.there[kind]] for kind, count in outcome.written.items()]
    print_table(["RECORDS", "TO WRITE" if dry_run else "WRITTEN", "THERE ALREADY"], rows, empty="")
    for name in made.unreadable:
        err.print(f"damaged, and left out: {name}")
    for line in LOST:
        err.print(f"not in any manifest: {line}")
    for one in made.sources:
        err.print(f"  {one.source}: {one.origin or 'an upload'} {one.commit}".rstrip())


async def _rebuild(installation: Installation, *, dry_run: bool) -> tuple[Rebuilt, Outcome]:
    async with opened(installation) as control:
        found = [Found(name, text, modified) async for name, text, modified in manifests_in(control)]
        made = manifests.records(found)
        outcome = Outcome()
        # What is named comes before what names it, and a run after its story: whoever sees a record finds all of it.
        for kind, bucket, records in (
            ("projects", "ingest", made.projects),
            ("snapshots", "ingest", made.snapshots),
            ("datasets", "scanner", made.datasets),
            ("scans", "scanner", made.scans),
            ("checkpoints", "trainer", made.checkpoints),
        ):
            await _write(control, outcome, kind, bucket, records, dry_run=dry_run)
        await _write_runs(control, outcome, made, dry_run=dry_run)
        if not dry_run:
            await _tell(control, made)
    return made, outcome


async def _write(
    control: Control, outcome: Outcome, kind: str, bucket: str, records: Iterable[Message], *, dry_run: bool
) -> None:
    outcome.written[kind] = outcome.there[kind] = 0
    is_there = await control.has_bucket(bucket)
    for record in records:
        table = _table(control, bucket, type(record))
        name: str = record.name  # type: ignore[attr-defined]
        if is_there and await table.find(name) is not None:
            outcome.there[kind] += 1
            continue
        outcome.written[kind] += 1
        if not dry_run:
            try:
                await table.create(record)
            except ResourceExists:  # a service was faster
                outcome.written[kind] -= 1
                outcome.there[kind] += 1


async def _write_runs(control: Control, outcome: Outcome, made: Rebuilt, *, dry_run: bool) -> None:
    state = control.state("trainer")
    is_there = await control.has_bucket("trainer")
    for run in made.runs:
        if dry_run or (is_there and await _table(control, "trainer", type(run)).find(run.name) is not None):
            continue
        for event in made.stories[run.name]:
            key = f"{_STORY}/{run.name}/{event.sequence:08d}/{run.status.epoch:06d}"
            try:
                await state.create(key, event.SerializeToString(deterministic=True))
            except ResourceExists:  # of a rebuild that broke off
                continue
    await _write(control, outcome, "runs", "trainer", made.runs, dry_run=dry_run)


async def _tell(control: Control, made: Rebuilt) -> None:
    """Inference learns of the best checkpoint of every project's newest run now, and not at its next look."""
    newest = {}
    for run in sorted(made.runs, key=lambda run: (run.status.create_time.ToNanoseconds(), run.name)):
        if run.best_checkpoint:
            newest[run.name.partition("/runs/")[0]] = run
    checkpoints = {one.name: one for one in made.checkpoints}
    bus = NatsBus(control.nats, "codegraft/operator")
    for run in newest.values():
        best = checkpoints[run.best_checkpoint]
        event = BestCheckpointChanged(
            checkpoint=best.name,
            sha256=best.sha256,
            base_model=best.base_model,
            base_digest=best.base_digest,
            test_loss=best.test_loss,
            base_test_loss=run.base_test_loss,
        )
        await bus.publish(BEST, best.name, event, id=f"rebuilt-{secrets.token_hex(8)}")


def _table(control: Control, bucket: str, message_type: type[Message]) -> Table[Any]:
    return Table(control.state(bucket), message_type, missing=NotFound)
