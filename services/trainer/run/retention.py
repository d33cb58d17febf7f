"""Which checkpoints of a run stay: the best and the one before it, the last, those that somebody keeps, and a few more.

The trainer does not know what serves. It knows what may: a pinned checkpoint is kept; who follows the best one is at
the run's best, at the one before while the new one is on its way, or at an older one that it holds: inference asks for
what its policies name, long before two more bests are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from codegraft.trainer.v1.checkpoint_pb2 import Checkpoint
from codegraft.trainer.v1.run_pb2 import Run
from services.core.errors import EtagMismatch, NotFound
from services.core.state import Table
from services.core.store import ObjectStore


def surplus(run: Run, checkpoints: Sequence[Checkpoint], keep: int, now: datetime) -> list[Checkpoint]:
    """Those that go, by step.

    Args:
        run: says which is the best one; the marks of checkpoints come before it, and go after.
        checkpoints: all of the run.
        keep: how many stay beside those that have to: the newest.
    """
    last = max((checkpoint.step for checkpoint in checkpoints), default=0)
    named = {run.best_checkpoint, run.previous_best_checkpoint}
    others = [
        one
        for one in checkpoints
        if not (one.best or one.kept or is_held(one, now) or one.step == last or one.name in named)
    ]
    others.sort(key=lambda checkpoint: checkpoint.step)
    return others[: max(0, len(others) - keep)]


def is_held(checkpoint: Checkpoint, now: datetime) -> bool:
    """Whether somebody holds it."""
    return checkpoint.hold_expire_time.ToDatetime(tzinfo=UTC) > now


async def delete_surplus(checkpoints: Table[Checkpoint], store: ObjectStore, run: Run, keep: int) -> list[int]:
    """Deletes the surplus of a run; returns its steps.

    The record goes first, and only as it was read: who marked it as kept meanwhile finds it kept. Then the manifest:
    what is left are blobs that nothing refers to, which other artifacts may share, and garbage collection takes.

    Args:
        run: as it is stored now.
    """
    found = await checkpoints.all(f"{run.name}/")
    steps = []
    for one in surplus(run, found, keep, datetime.now(UTC)):
        try:
            await checkpoints.delete(one.name, etag=one.etag)
        except (EtagMismatch, NotFound):
            continue
        steps.append(one.step)
    # Those without a record: just deleted, or by an attempt that ended between record and manifest.
    recorded = {one.step for one in found} - set(steps)
    prefix = f"{run.name}/checkpoints/"
    keys = [key async for key in store.list(prefix) if key.endswith("/manifest.json")]
    for key in keys:
        step = int(key.removeprefix(prefix).split("/")[0])
        if step not in recorded and step < max(recorded, default=0):
            await store.delete(key)
    return steps
