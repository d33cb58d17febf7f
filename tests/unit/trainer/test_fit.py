"""What a run does where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from codegraft.trainer.v1.hyperparameters_pb2 import Plan, PlannedSetting
from services.core import errors
from services.trainer.corpus.data import Row
from services.trainer.planning import fit, memory
from services.trainer.planning.fit import find_fit, limited, longest
from services.trainer.planning.settings import Settings

ROW = Row(list(range(64)), list(range(64)), list(range(64)))


class Short:
    """A trainee whose device has room for so many rows, and for more with gradient checkpointing."""

    def __init__(self, settings: Settings, room: int, error: Exception, saved: int) -> None:
        self.settings = settings
        self._room = saved if settings.low_gpu_memory_mode else room
        self._error = error
        self.masters: dict[str, torch.Tensor] = {}
        self.dropped = True

    def accumulate(self, rows: Sequence[Row], total_tokens: int) -> float:
        self.dropped = False
        if sum(len(row.ids) for row in rows) > self._room * len(ROW.ids):
            raise self._error
        return 1.0

    def drop_gradients(self) -> None:
        self.dropped = True


def found(
    settings: Settings, room: int, saved: int = 0, *, may_save: bool = True, error: Exception | None = None, **rest: Any
) -> tuple[Any, fit.Fit]:
    error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    make: Any = lambda settings: Short(settings, room, error, saved)  # noqa: E731
    return find_fit(make, ROW, settings, may_save=may_save, is_cancelled=lambda: False, **rest)


@pytest.fixture(autouse=True)
def nothing_to_collect(monkeypatch: pytest.MonkeyPatch) -> None:
    """These trainees hold no memory, and looking through everything that is imported takes a second."""
    monkeypatch.setattr(fit.gc, "collect", lambda: 0)


@pytest.fixture
def wanted(settings: Callable[..., Settings]) -> Settings:
    return settings(batch_size=12, micro_batch_size=12)


@pytest.mark.parametrize(("room", "rows"), [(99, 12), (12, 12), (11, 4), (4, 4), (3, 2), (1, 1)])
def test_fewer_rows_at_once_where_all_do_not_fit(wanted: Settings, room: int, rows: int) -> None:
    trainee, result = found(wanted, room)
    assert (result.rows, result.low_memory) == (rows, False) and trainee.dropped
    assert bool(result.why) == (rows < 12)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
        MemoryError(),
    ],
)
def test_low_memory_mode_comes_to_help_where_not_even_one_row_fits(wanted: Settings, error: Exception) -> None:
    trainee, result = found(wanted, 0, saved=3, error=error)
    assert (result.rows, result.low_memory) == (2, True) and trainee.settings.low_gpu_memory_mode
    told = Plan(
        settings=[
            PlannedSetting(name=name, value="?", given=True) for name in ("micro_batch_size", "low_gpu_memory_mode")
        ]
    )
    after = limited(wanted, told, result)
    assert (after.micro_batch_size, after.low_gpu_memory_mode, after.batch_size) == (2, True, 12)
    assert told.hyperparameters == after.to_proto()
    assert [(s.value, s.given) for s in told.settings] == [("2", False), ("true", False)]
    assert told.settings[0].why == "12 rows did not fit in memory"


def test_what_fits_nowhere_is_refused_with_its_field(wanted: Settings) -> None:
    with pytest.raises(errors.OutOfMemory) as caught:
        found(wanted, 0)
    assert caught.value.field == "hyperparameters.micro_batch_size" and caught.value.is_callers_fault
    with pytest.raises(errors.OutOfMemory):
        found(wanted, 0, saved=3, may_save=False)  # the caller wants it off


def test_another_failure_is_none_of_memory(wanted: Settings) -> None:
    with pytest.raises(RuntimeError, match="shape"):
        found(wanted, 0, error=RuntimeError("shape mismatch"))


def test_a_try_that_would_not_fit_is_never_made(wanted: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel ends a process that takes too much, so that trying is no way to find out."""
    tried: list[int] = []

    class Counting(Short):
        def accumulate(self, rows: Sequence[Row], total_tokens: int) -> float:
            tried.append(sum(len(row.ids) for row in rows))
            return 1.0

    monkeypatch.setattr(memory, "resident", lambda: 1000)
    monkeypatch.setattr(memory, "peak", lambda: 1000 + 10 * tried[-1])
    make: Any = lambda settings: Counting(settings, 99, MemoryError(), 0)  # noqa: E731
    _, result = find_fit(
        make, ROW, wanted, may_save=True, is_cancelled=lambda: False, free=lambda: round(10 * 64 * 5 / 0.95)
    )
    assert result.rows == 4 and tried == [8, 16, 64, 128, 256, 256]
    tried.clear()
    with pytest.raises(errors.OutOfMemory, match="needs about 0 MB more"):
        find_fit(make, ROW, wanted, may_save=False, is_cancelled=lambda: False, free=lambda: 400)
    assert tried == [8, 16]


def test_the_second_pass_counts_too(wanted: Settings) -> None:
    """It adds to the gradients of the first, and a full memory is full of holes by then."""

    class Fragmented(Short):
        passes = 0

        def accumulate(self, rows: Sequence[Row], total_tokens: int) -> float:
            self.passes += len(rows) == 12
            if len(rows) == 12 and self.passes == 2:
                raise self._error
            return 1.0

    make: Any = lambda settings: Fragmented(settings, 99, MemoryError(), 0)  # noqa: E731
    _, result = find_fit(make, ROW, wanted, may_save=True, is_cancelled=lambda: False)
    assert result.rows == 4


def test_cancelling_stops_between_two_tries(wanted: Settings) -> None:
    with pytest.raises(errors.JobCancelled):
        find_fit(lambda _: Short(wanted, 9, MemoryError(), 0), ROW, wanted, may_save=True, is_cancelled=lambda: True)  # type: ignore[arg-type, return-value]


def test_the_row_is_as_long_as_any_can_be() -> None:
    row = longest([Row([1, 2], [2, 3], [0, 1]), Row([4, 5, 6], [5, 6, 7], [0, 1, 2])], 8)
    assert row.ids == [4, 5, 6, 4, 5, 6, 4, 5] and row.positions == list(range(8)) and len(row.labels) == 8


def test_free_memory_is_what_the_tightest_limit_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.free()
    assert 1e7 < whole < 1e14 and 1e7 < memory.resident() <= memory.peak() * 1.01
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 20000\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_CGROUP_V1", tmp_path / "none")
    assert memory.free() == 120_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free() > 1e7
