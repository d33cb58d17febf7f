"""``codegraft rebuild``: control state made anew from the manifests in the object store, after NATS lost everything."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from google.protobuf.message import Message

from codegraft.event.v1.events_pb2 import BestCheckpointChanged
from codegraft.inference.v1.serving_pb2 import Serving
from services.cli.control import copied, manifests
from services.cli.control.backup import manifests_in
from services.cli.control.copies import Copies, fitting
from services.cli.control.installation import Control, Installation, opened
from services.cli.control.manifests import Found, Rebuilt
from services.cli.output import Json, err, print_json, print_table
from services.cli.stack import Data
from services.core.errors import NotFound, ResourceExists
from services.core.events.nats import NatsBus
from services.core.state import Table
from services.inference.policy import decided

BEST = "codegraft.trainer.checkpoint.best.v1"
LOST = (
    "git credentials: make them again under the names that sources have for them",
    "API keys and quotas: keys of ingest's settings come back when it is restarted, make the others anew",
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
    credentials: list[str] = field(default_factory=list)
    """Credentials that sources name and that are not there: they have to be made again."""
    uploads: list[str] = field(default_factory=list)
    """Uploads that sources are made of, and whose content the store lost."""
    unfit: dict[str, list[str]] = field(default_factory=dict)
    """By policy: checkpoints that it names and that are not there."""


def rebuild(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would come back.")] = False,
    data: Data = None,
    json: Json = False,
) -> None:
    """Make projects, sources, datasets, runs, checkpoints and policies anew from what the object store has of them.

    For when the state in NATS is lost and there is no backup (see codegraft backup), or only an old one: restore that
    first, then rebuild adds what is newer. Records that are there stay as they are, so it may be repeated, and services
    may run. Projects that were deleted stay deleted. Sources are fetched again at once, of git only what has moved.
    Inference serves what it served within seconds. Whatever the store does not tell is lost, and listed at the end.

    With a cluster, CODEGRAFT_NATS_REPLICAS=3 makes buckets that are not there yet with as many copies.

    Example: codegraft rebuild --dry-run
    """
    made, records, outcome = asyncio.run(_rebuild(Installation.find(data), dry_run=dry_run))
    if json:
        print_json(
            {
                "written": outcome.written,
                "there_already": outcome.there,
                "dry_run": dry_run,
                "lost": list(LOST),
                "lost_credentials": outcome.credentials,
                "lost_uploads": outcome.uploads,
                "lost_checkpoints": outcome.unfit,
                "lost_sources": [
                    {"name": one.source, "origin": one.origin, "commit": one.commit} for one in made.lost_sources
                ],
                "deleted_projects": sorted(records.deleted),
                "unreadable": [*made.unreadable, *records.unreadable],
            }
        )
        return
    rows = [[kind, count, outcome.there[kind]] for kind, count in outcome.written.items()]
    print_table(["RECORDS", "TO WRITE" if dry_run else "WRITTEN", "THERE ALREADY"], rows, empty="")
    for line in _told(made, records, outcome):
        err.print(line)


def _told(made: Rebuilt, records: Copies, outcome: Outcome) -> Iterator[str]:
    """What a person has to know and perhaps to do."""
    yield from (f"damaged, and left out: {name}" for name in (*made.unreadable, *records.unreadable))
    if records.deleted:
        yield f"deleted, and stay so: {', '.join(sorted(records.deleted))}"
    yield from (f"the store does not tell: {line}" for line in LOST)
    yield from (f"make it again (codegraft credential add-token, add-key): {name}" for name in outcome.credentials)
    yield from (f"upload it again, its content is lost: {name}" for name in outcome.uploads)
    for policy, checkpoints in outcome.unfit.items():
        yield f"{policy} names {', '.join(checkpoints)}, which is lost: choose another (codegraft serve set)"
    for one in made.lost_sources:
        origin = f"{one.origin or 'an upload'} {one.commit}".rstrip()
        yield f"removed, or of a release that made no copies; then add it again: {one.source} ({origin})"


async def _rebuild(installation: Installation, *, dry_run: bool) -> tuple[Rebuilt, Copies, Outcome]:
    async with opened(installation) as control:
        records = await copied.read(control)
        found = [Found(name, text, modified) async for name, text, modified in manifests_in(control)]
        made = manifests.records(found, records)
        outcome = Outcome(credentials=await copied.lost_credentials(control, records.sources))
        uploads, outcome.uploads = await copied.uploads(control, records.sources)
        there = {one.name for one in made.checkpoints}
        outcome.unfit = {one.name: lost for one in records.policies if (lost := fitting(one, there))}
        # What is named comes before what names it, and a run after its story: whoever sees a record finds all of it.
        for kind, bucket, wanted in (
            ("projects", "ingest", made.projects),
            ("snapshots", "ingest", made.snapshots),
            ("datasets", "scanner", made.datasets),
            ("scans", "scanner", made.scans),
            ("checkpoints", "trainer", made.checkpoints),
            ("uploads", "ingest", uploads),
            ("sources", "ingest", records.sources),
        ):
            await _write(control, outcome, kind, bucket, wanted, dry_run=dry_run)
        await _write_runs(control, outcome, made, dry_run=dry_run)
        await _write(control, outcome, "policies", "inference", records.policies, precedes=_precedes, dry_run=dry_run)
        if not dry_run:
            await _tell(control, made)
    return made, records, outcome


async def _write(
    control: Control,
    outcome: Outcome,
    kind: str,
    bucket: str,
    records: Iterable[Message],
    *,
    precedes: Callable[[Any, Any], bool] = lambda record, there: False,
    dry_run: bool,
) -> None:
    """Writes what is not there.

    Args:
        precedes: whether a record takes the place of another one that is there.
    """
    outcome.written[kind] = outcome.there[kind] = 0
    is_there = await control.has_bucket(bucket)
    for record in records:
        table = _table(control, bucket, type(record))
        name: str = record.name  # type: ignore[attr-defined]
        there = await table.find(name) if is_there else None
        if there is not None and not precedes(record, there):
            outcome.there[kind] += 1
            continue
        outcome.written[kind] += 1
        if dry_run:
            continue
        if there is not None:

            def replace(old: Any, new: Message = record) -> None:
                if precedes(new, old):
                    old.CopyFrom(new)

            await table.mutate(name, replace)
            continue
        try:
            await table.create(record)
        except ResourceExists:  # a service was faster
            outcome.written[kind] -= 1
            outcome.there[kind] += 1


def _precedes(policy: Serving, there: Serving) -> bool:
    """Since the loss a first completion may have made a policy, before what a person had decided came back."""
    return decided(policy) and not decided(there)


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
