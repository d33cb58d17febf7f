"""Which checkpoints stay."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codegraft.trainer.v1.checkpoint_pb2 import Checkpoint
from services.core.errors import CheckpointNotFound
from services.core.state import MemoryState, Table
from services.core.store import MemoryStore
from services.trainer.run.retention import delete_surplus, surplus

RUN = "projects/p/runs/r"


def made(step: int, **fields: Any) -> Checkpoint:
    return Checkpoint(name=f"{RUN}/checkpoints/{step}", step=step, **fields)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12), st.integers(0, 5))
def test_best_last_and_kept_stay_with_the_newest_of_the_others(marks: list[tuple[bool, bool]], keep: int) -> None:
    found = [made(n + 1, best=best, kept=kept) for n, (best, kept) in enumerate(marks)]
    gone = surplus(found, keep)
    assert not any(one.best or one.kept or one.step == len(found) for one in gone)
    stay = [one for one in found if one not in gone]
    plain = [one for one in stay if not (one.best or one.kept or one.step == len(found))]
    assert len(plain) == min(keep, len(plain) + len(gone))
    assert all(old.step < new.step for old in gone for new in plain)


async def test_record_and_manifest_go_and_what_an_earlier_attempt_left_half_deleted() -> None:
    table, store = Table(MemoryState(), Checkpoint, missing=CheckpointNotFound), MemoryStore()
    for step in range(1, 7):
        await store.put(f"{RUN}/checkpoints/{step}/manifest.json", b"{}")
        if step != 2:  # of which only the manifest is left
            await table.create(made(step, best=step == 1))
    await store.put(f"{RUN}0/checkpoints/1/manifest.json", b"{}")
    await store.put(f"{RUN}/checkpoints/9/manifest.json", b"{}")  # on its way: its record comes after it
    assert await delete_surplus(table, store, RUN, 2) == [3]
    assert [one.step for one in await table.all(RUN + "/")] == [1, 4, 5, 6]
    left = sorted([key.split("/")[-2] async for key in store.list(f"{RUN}/")])
    assert left == ["1", "4", "5", "6", "9"]
    assert await store.size(f"{RUN}0/checkpoints/1/manifest.json") is not None
    assert await delete_surplus(table, store, RUN, 2) == []


async def test_a_mark_that_comes_between_reading_and_deleting_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    table, store = Table(MemoryState(), Checkpoint, missing=CheckpointNotFound), MemoryStore()
    for step in (1, 2):
        await table.create(made(step))
    read = table.all

    async def all_then_mark(prefix: str = "") -> list[Checkpoint]:
        found = await read(prefix)

        def mark(record: Checkpoint) -> None:
            record.kept = True

        await table.mutate(found[0].name, mark)
        return found

    monkeypatch.setattr(table, "all", all_then_mark)
    assert await delete_surplus(table, store, RUN, 0) == []
    assert (await table.get(made(1).name)).kept
