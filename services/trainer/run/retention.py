"""Which checkpoints of a run stay: the best, the last, those that somebody keeps, and a few more."""

from __future__ import annotations

from collections.abc import Sequence

from codegraft.trainer.v1.checkpoint_pb2 import Checkpoint
from services.core.errors import EtagMismatch, NotFound
from services.core.state import Table
from services.core.store import ObjectStore


def surplus(checkpoints: Sequence[Checkpoint], keep: int) -> list[Checkpoint]:
    """Those that go, by step.

    Args:
        checkpoints: all of a run.
        keep: how many stay beside the best, the last and the kept ones: the newest.
    """
    last = max((checkpoint.step for checkpoint in checkpoints), default=0)
    others = [one for one in checkpoints if not (one.best or one.kept or one.step == last)]
    others.sort(key=lambda checkpoint: checkpoint.step)
    return others[: max(0, len(others) - keep)]


async def delete_surplus(checkpoints: Table[Checkpoint], store: ObjectStore, run: str, keep: int) -> list[int]:
    """Deletes the surplus of a run; returns its steps.

    The record goes first, and only as it was read: who marked it as kept meanwhile finds it kept. Then the manifest:
    what is left are blobs that nothing refers to, which other artifacts may share, and garbage collection takes.
    """
    found = await checkpoints.all(f"{run}/")
    steps = []
    for one in surplus(found, keep):
        try:
            await checkpoints.delete(one.name, etag=one.etag)
        except (EtagMismatch, NotFound):
            continue
        steps.append(one.step)
    # Those without a record: just deleted, or by an attempt that ended between record and manifest.
    recorded = {one.step for one in found} - set(steps)
    prefix = f"{run}/checkpoints/"
    keys = [key async for key in store.list(prefix) if key.endswith("/manifest.json")]
    for key in keys:
        step = int(key.removeprefix(prefix).split("/")[0])
        if step not in recorded and step < max(recorded, default=0):
            await store.delete(key)
    return steps
