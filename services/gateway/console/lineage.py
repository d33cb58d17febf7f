"""Where an adapter came from: the run, its dataset, the snapshot and the commits in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from codegraft.ingest.v1.snapshot_pb2 import Snapshot
from codegraft.scanner.v1.dataset_pb2 import Dataset
from codegraft.trainer.v1.checkpoint_pb2 import Checkpoint
from codegraft.trainer.v1.run_pb2 import Run
from services.client import AsyncCodegraft
from services.core.errors import DeadlineExceeded, NotFound, Unavailable


@dataclass(slots=True)
class Lineage:
    """As far back as it is known: what was deleted since, and what is behind it, is None."""

    checkpoint: Checkpoint | None = None
    run: Run | None = None
    dataset: Dataset | None = None
    snapshot: Snapshot | None = None
    gone: str = field(default="")
    """Name of what is no more there."""
    away: str = field(default="")
    """Name of what cannot be asked for now."""


async def of(client: AsyncCodegraft, checkpoint: str) -> Lineage:
    """The lineage of a checkpoint; an empty one for the base model."""
    found = Lineage()
    if not checkpoint:
        return found
    name = checkpoint
    try:
        found.checkpoint = await client.runs.checkpoint(name)
        name = checkpoint.partition("/checkpoints/")[0]
        found.run = await client.runs.get(name)
        if name := found.run.dataset:
            found.dataset = await client.datasets.get(name)
            name = found.dataset.snapshot
            found.snapshot = await client.snapshots.get(name)
    except NotFound:
        found.gone = name
    except (Unavailable, DeadlineExceeded):  # what serves can be looked at, and changed, without it
        found.away = name
    return found
