"""Which checkpoints stay."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codegraft.trainer.v1.checkpoint_pb2 import Checkpoint
from codegraft.trainer.v1.run_pb2 import Run
from codegraft.trainer.v1.training_pb2 import CheckpointWritten, TrainingLoaded
from services.core.errors import CheckpointNotFound
from services.core.jobs import JobContext, new_status
from services.core.jobs.states import claim
from services.core.runtime import Runtime
from services.core.state import MemoryState, Table
from services.core.store import MemoryStore
from services.trainer.records import BUCKET, Tables
from services.trainer.run.commit import Committer
from services.trainer.run.retention import delete_surplus, surplus
from services.trainer.run.telling import Teller

RUN = "projects/p/runs/r"


def made(step: int, **fields: Any) -> Checkpoint:
    return Checkpoint(name=f"{RUN}/checkpoints/{step}", step=step, **fields)


NOW = datetime(2026, 11, 1, tzinfo=UTC)


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from([None, -1, 1])), max_size=12),
    st.integers(0, 5),
    st.data(),
)
def test_what_may_serve_the_last_and_the_kept_stay_with_the_newest_of_the_others(
    marks: list[tuple[bool, bool, int | None]], keep: int, data: st.DataObject
) -> None:
    found = []
    for n, (best, kept, hold) in enumerate(marks):
        found.append(made(n + 1, best=best, kept=kept))
        if hold:
            found[-1].hold_expire_time.FromDatetime(NOW + timedelta(seconds=hold))
    names = st.sampled_from(["", *(one.name for one in found)])
    run = Run(name=RUN, best_checkpoint=data.draw(names), previous_best_checkpoint=data.draw(names))

    def has_to_stay(one: Checkpoint) -> bool:
        serves = one.name in (run.best_checkpoint, run.previous_best_checkpoint)
        held = marks[one.step - 1][2] == 1
        return serves or one.best or one.kept or held or one.step == len(found)

    gone = surplus(run, found, keep, NOW)
    assert not any(has_to_stay(one) for one in gone)
    plain = [one for one in found if one not in gone and not has_to_stay(one)]
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
    assert await delete_surplus(table, store, Run(name=RUN), 2) == [3]
    assert [one.step for one in await table.all(RUN + "/")] == [1, 4, 5, 6]
    left = sorted([key.split("/")[-2] async for key in store.list(f"{RUN}/")])
    assert left == ["1", "4", "5", "6", "9"]
    assert await store.size(f"{RUN}0/checkpoints/1/manifest.json") is not None
    assert await delete_surplus(table, store, Run(name=RUN), 2) == []


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
    assert await delete_surplus(table, store, Run(name=RUN), 0) == []
    assert (await table.get(made(1).name)).kept


# --- as a run goes ---


class Going:
    """A run in the hands of a worker, that keeps nothing but what has to stay."""

    def __init__(self, folder: Path) -> None:
        self.runtime = Runtime.memory()
        self.tables = Tables.of(self.runtime.state(BUCKET))
        self._folder = folder

    async def begin(self) -> None:
        run = Run(name=RUN, base_test_loss=2.0, status=new_status())
        claim(run.status, "worker", timedelta(minutes=1))
        run = await self.tables.runs.create(run)
        self.teller = Teller(self.tables.story, self.runtime.events, JobContext(self.tables.runs, run, RUN))
        self._committer = Committer(
            self.teller,
            self.tables.checkpoints,
            self.runtime.artifacts,
            self.runtime.storage,
            TrainingLoaded(),
            "digest",
        )

    async def commit(self, step: int, test_loss: float | None = None, *, best: bool = False) -> list[int]:
        """Steps that are there afterwards, each with its files."""
        adapter = self._folder / str(step)
        adapter.mkdir(exist_ok=True)
        (adapter / "adapter_model.safetensors").write_bytes(b"%d" % step)
        written = CheckpointWritten(step=step, test_loss=test_loss, best=best, adapter_path=str(adapter))
        await self._committer.commit(written)
        await delete_surplus(self.tables.checkpoints, self.runtime.store, self.teller.run, 0)
        there = await self.tables.checkpoints.all(f"{RUN}/")
        prefix = f"{RUN}/checkpoints/"
        manifests = {int(key.removeprefix(prefix).split("/")[0]) async for key in self.runtime.store.list(prefix)}
        assert manifests == {one.step for one in there}
        return sorted(manifests)

    async def marked(self) -> list[int]:
        return [one.step for one in await self.tables.checkpoints.all(f"{RUN}/") if one.best]


async def test_keeping_none_keeps_what_may_serve(tmp_path: Path) -> None:
    run = Going(tmp_path)
    await run.begin()
    assert await run.commit(2) == [2]
    assert await run.commit(4, 1.5, best=True) == [4]
    assert await run.commit(6, 1.4) == [4, 6]  # better, but refused: it forgets
    assert await run.commit(8, 1.2, best=True) == [4, 8]  # replicas may still be at 4, or refuse 8
    assert await run.commit(10, 1.1) == [4, 8, 10]
    assert await run.commit(12, 1.0, best=True) == [8, 12]
    assert await run.commit(14, 1.3) == [8, 12, 14]
    await run.tables.keep(f"{RUN}/checkpoints/14", kept=True)  # as pinning it does
    assert await run.commit(16) == [8, 12, 14, 16]
    assert await run.marked() == [12] and run.teller.run.previous_best_checkpoint == f"{RUN}/checkpoints/8"


async def test_what_is_held_stays_two_bests_later(tmp_path: Path) -> None:
    run = Going(tmp_path)
    await run.begin()
    await run.commit(4, 1.5, best=True)
    await run.tables.hold(f"{RUN}/checkpoints/4", datetime.now(UTC) + timedelta(hours=1))  # by a replica that serves it
    await run.tables.hold(f"{RUN}/checkpoints/4", datetime.now(UTC) + timedelta(seconds=1))  # the longer one counts
    for step in (8, 12, 16):
        await run.commit(step, 1.5 - step / 100, best=True)
    assert await run.commit(18) == [4, 12, 16, 18]

    def end(record: Checkpoint) -> None:
        record.hold_expire_time.FromDatetime(datetime.now(UTC) - timedelta(seconds=1))

    await run.tables.checkpoints.mutate(f"{RUN}/checkpoints/4", end)
    assert await run.commit(20) == [12, 16, 20]


async def test_the_best_stays_although_it_is_measured_again_and_worse(tmp_path: Path) -> None:
    """By a later attempt that went back to the state before it, on a machine that rounds otherwise."""
    run = Going(tmp_path)
    await run.begin()
    await run.commit(4, 1.5, best=True)
    await run.commit(8, 1.4999, best=True)
    assert await run.commit(8, 1.5001) == [4, 8]
    assert await run.commit(9) == [4, 8, 9] and await run.marked() == [8]
    assert run.teller.run.best_checkpoint == f"{RUN}/checkpoints/8"
    await run.commit(8, 1.4999, best=True)  # the same again
    assert run.teller.run.previous_best_checkpoint == f"{RUN}/checkpoints/4"
