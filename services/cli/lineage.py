"""``codegraft serve lineage``: where an adapter came from."""

from __future__ import annotations

from typing import Annotated

import typer
from google.protobuf.message import Message

from services.cli.connect import Project, checkpoint_name, connect
from services.cli.output import Json, err, print_json
from services.client import Codegraft
from services.core.errors import NotFound


def lineage(
    project: Project,
    checkpoint: Annotated[
        str, typer.Argument(metavar="[RUN[/STEP]]", help="Which one, of a run its best; left out: what serves now.")
    ] = "",
    json: Json = False,
) -> None:
    """Show where an adapter came from: its run, the dataset of that, and the snapshot with its commits.

    Example: codegraft serve lineage -p acme
    """
    with connect() as client:
        name = checkpoint_name(project, checkpoint) if checkpoint else ""
        name = name or client.serving.get(project).status.active_checkpoint
        found, gone = _trace(client, name) if name else ({}, "")
    if json:
        print_json({**found, "gone": gone})
        return
    if not name:
        err.print("the base model answers")
    for kind, thing in found.items():
        err.print(f"{kind:11}{thing.name}")  # type: ignore[attr-defined]
    for source in getattr(found.get("snapshot"), "sources", ()):
        origin = "uploaded" if source.origin.startswith("projects/") else source.origin
        err.print(f"  source   {source.source} {source.commit[:12] or '-'} {origin}")
    if gone:
        err.print(f"{gone} is no more there")


def _trace(client: Codegraft, name: str) -> tuple[dict[str, Message], str]:
    """The things by what they are, as far back as they are there, and the name of the first that is not."""
    found: dict[str, Message] = {}
    try:
        checkpoint = client.runs.checkpoint(name)
        found["checkpoint"], name = checkpoint, checkpoint.name.partition("/checkpoints/")[0]
        run = client.runs.get(name)
        found["run"], name = run, run.dataset
        if name:
            dataset = client.datasets.get(name)
            found["dataset"], name = dataset, dataset.snapshot
            found["snapshot"] = client.snapshots.get(name)
    except NotFound:
        return found, name
    return found, ""
