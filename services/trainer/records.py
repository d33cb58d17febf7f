"""The records of the trainer: runs, checkpoints, and the story of each run."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from codegraft.trainer.v1.checkpoint_pb2 import Checkpoint
from codegraft.trainer.v1.run_event_pb2 import RunEvent
from codegraft.trainer.v1.run_pb2 import Run
from services.core import names
from services.core.errors import CheckpointNotFound, RunNotFound
from services.core.state import StateStore, Table

BUCKET = "trainer"
BEST = "best"
"""The id that names a run's best checkpoint."""
_STORY = "RunEvent/"


@dataclass(frozen=True, slots=True)
class Tables:
    """What the trainer keeps in JetStream KV."""

    runs: Table[Run]
    checkpoints: Table[Checkpoint]
    story: Story

    @classmethod
    def of(cls, state: StateStore) -> Tables:
        """The tables in a bucket."""
        return cls(
            Table(state, Run, missing=RunNotFound),
            Table(state, Checkpoint, missing=CheckpointNotFound),
            Story(state),
        )

    async def find_checkpoint(self, name: str, field: str = "name") -> Checkpoint:
        """A checkpoint by its full name; the id "best" names its run's best one.

        Args:
            field: where the name came from.

        Raises:
            InvalidName, RunNotFound, CheckpointNotFound.
        """
        if names.parse(names.CHECKPOINT, name, field=field)["step"] == BEST:
            run = await self.runs.get(name.removesuffix(f"/checkpoints/{BEST}"))
            if not run.best_checkpoint:
                raise CheckpointNotFound(
                    f"{run.name} has no checkpoint that beats the base model", field=field, hint="Name a step."
                )
            name = run.best_checkpoint
        return await self.checkpoints.get(name)

    async def keep(self, name: str, *, kept: bool) -> Checkpoint:
        """Marks a checkpoint so that retention leaves it alone, or takes the mark away."""

        def change(record: Checkpoint) -> None:
            record.kept = kept

        return await self.checkpoints.mutate(name, change)

    async def hold(self, name: str, until: datetime) -> Checkpoint:
        """Has retention leave a checkpoint alone for a time, or for longer where somebody asked for that."""

        def change(record: Checkpoint) -> None:
            if record.hold_expire_time.ToDatetime(tzinfo=UTC) < until:
                record.hold_expire_time.FromDatetime(until)

        return await self.checkpoints.mutate(name, change)


class Story:
    """The events of runs, in order and without gaps.

    An event is written before the run's ``last_sequence`` counts it, and under the epoch of the attempt that wrote it.
    A worker that lost its lease can thus leave an event that no run counts, or one that the next attempt outranks,
    but never change the story.
    """

    def __init__(self, state: StateStore) -> None:
        self._state = state

    async def write(self, run: str, event: RunEvent, epoch: int) -> None:
        """Keeps an event; the caller then moves the run's last_sequence on to it."""
        key = f"{_STORY}{run}/{event.sequence:08d}/{epoch:06d}"
        value = event.SerializeToString(deterministic=True)
        there = await self._state.get(key)
        if there is None:
            await self._state.create(key, value)
        else:  # this same attempt tried before, and could not count it
            await self._state.update(key, value, there.revision)

    async def forget(self, run: str) -> None:
        """Deletes all events of a run."""
        for key in await self._state.keys(f"{_STORY}{run}/"):
            await self._state.delete(key)

    async def read(self, run: str, after: int, until: int) -> list[RunEvent]:
        """The events with after < sequence <= until."""
        if until <= after:
            return []
        one = f"/{until:08d}" if until == after + 1 else ""
        newest: dict[int, RunEvent] = {}
        for entry in await self._state.list(f"{_STORY}{run}{one}/"):  # by sequence, then by epoch
            event = RunEvent.FromString(entry.value or b"")
            if after < event.sequence <= until:
                newest[event.sequence] = event
        return [newest[sequence] for sequence in sorted(newest)]
