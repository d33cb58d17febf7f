"""Whether a run fits in memory, found out before its first step: by a dry run on the longest row there can be.

On a GPU too much raises torch.OutOfMemoryError, and that is all there is to know. On a CPU the kernel may end the
process without a word, so the tries grow from a part of a row, each one's peak is measured, and the next is only made
when what it will need is there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from codegraft.trainer.v1.hyperparameters_pb2 import Plan
from services.core import log
from services.core.errors import JobCancelled, OutOfMemory
from services.trainer.corpus.data import Row
from services.trainer.planning import memory
from services.trainer.planning.plan import amend
from services.trainer.planning.settings import Settings

if TYPE_CHECKING:
    from services.trainer.model.lora import Trainee

_SPARE = 0.95
"""Share of the free memory that a try may need by the estimate."""

logger = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Fit:
    """What fits."""

    rows: int
    """Rows per forward pass."""
    low_memory: bool
    wanted_rows: int

    @property
    def why(self) -> str:
        """Why it is less than was wanted; empty when it is not."""
        return "" if self.rows == self.wanted_rows else f"{self.wanted_rows} rows did not fit in memory"


def find_fit(
    make: Callable[[Settings], Trainee],
    row: Row,
    settings: Settings,
    *,
    may_save: bool,
    is_cancelled: Callable[[], bool],
    free: Callable[[], int] | None = None,
) -> tuple[Trainee, Fit]:
    """The trainee, and how many rows at once it can train on; gradient checkpointing comes to help before giving up.

    Args:
        make: loads the model with the adapter.
        row: the longest one.
        settings: as wanted.
        may_save: whether low memory mode may be turned on.
        free: bytes of memory that can still be had; None on a GPU, which says so itself.

    Raises:
        OutOfMemory: not even one row fits.
        JobCancelled.
    """
    modes = [True] if settings.low_gpu_memory_mode else [False, True] if may_save else [False]
    trial = _Trial(free)
    for low_memory in modes:
        trainee = make(replace(settings, low_gpu_memory_mode=low_memory))
        rows = trial.largest(trainee, row, settings, is_cancelled)
        if rows:
            fit = Fit(rows, low_memory, settings.micro_batch_size)
            if fit.why:
                logger.warning("a smaller micro-batch", wanted=fit.wanted_rows, rows=rows, low_memory=low_memory)
            return trainee, fit
        del trainee
        gc.collect()
    raise OutOfMemory(
        f"one row of {len(row.ids)} tokens does not fit in memory, {trial.lack}",
        field="hyperparameters.micro_batch_size",
        hint="Lower context_length or lora_r, take a smaller base model, or give the worker more memory.",
    )


def limited(settings: Settings, plan: Plan, fit: Fit) -> Settings:
    """The settings within what fits; the plan is told why."""
    rows = max(size for size in range(1, fit.rows + 1) if settings.batch_size % size == 0)
    if rows < settings.micro_batch_size:
        settings = replace(settings, micro_batch_size=rows)
        amend(plan, "micro_batch_size", value=str(rows), why=fit.why)
    if fit.low_memory and not settings.low_gpu_memory_mode:
        settings = replace(settings, low_gpu_memory_mode=True)
        amend(plan, "low_gpu_memory_mode", value="true", why="on: without it one row did not fit in memory")
    plan.hyperparameters.CopyFrom(settings.to_proto())
    return settings


def longest(rows: Sequence[Row], window: int) -> Row:
    """A row as long as any can be, one document all along, which needs the most memory."""
    row = max(rows, key=lambda row: len(row.ids))
    times = -(-window // len(row.ids))
    return Row((row.ids * times)[:window], (row.labels * times)[:window], list(range(window)))


class _Trial:
    """Tries with more and more tokens at once, and what they showed."""

    def __init__(self, free: Callable[[], int] | None) -> None:
        self._free = free
        self.lack = "as its allocator says"

    def largest(self, trainee: Trainee, row: Row, settings: Settings, is_cancelled: Callable[[], bool]) -> int:
        """Rows at once that fit, at most those of the settings; 0 when one does not."""
        # What a step holds besides: the masters' gradients, the optimizer's two moments, and the adapter's gradients.
        ballast = [torch.ones_like(master) for master in trainee.masters.values() for _ in range(4)]
        fitting = self._climb(trainee, row, settings, is_cancelled)
        # A second time, onto the gradients of the first and into memory that has holes by now.
        while fitting and _dry_run(trainee, [row] * fitting) is None:
            fitting = max((rows for rows, _ in _ladder(settings, small=False) if rows < fitting), default=0)
        del ballast
        return fitting

    def _climb(self, trainee: Trainee, row: Row, settings: Settings, is_cancelled: Callable[[], bool]) -> int:
        peaks: list[tuple[int, int]] = []  # tokens at once, bytes of the process at their peak
        fitting = 0
        for rows, share in _ladder(settings, small=self._free is not None):
            if is_cancelled():
                raise JobCancelled("cancelled while memory was measured")
            part = _cut(row, share)
            if not self._may_try(peaks, rows * len(part.ids)):
                break
            peak = _dry_run(trainee, [part] * rows)
            if peak is None:
                self.lack = "as its allocator says"
                break
            peaks.append((rows * len(part.ids), peak))
            fitting = rows if share == 1 else 0
        return fitting

    def _may_try(self, peaks: list[tuple[int, int]], tokens: int) -> bool:
        """Whether the straight line through the last two peaks stays within what is free."""
        if self._free is None or len(peaks) < 2:
            return True
        (fewer, low), (more, high) = peaks[-2:]
        needed = high + max(0, high - low) * (tokens - more) // max(1, more - fewer) - memory.resident()
        there = self._free()
        self.lack = f"which needs about {needed / 1e6:,.0f} MB more, and {there / 1e6:,.0f} MB are free"
        return needed <= _SPARE * there


def _ladder(settings: Settings, *, small: bool) -> list[tuple[int, float]]:
    """Rows at once, and the share of a row: from little to what is wanted, each at least twice the one before."""
    sizes = [size for size in range(1, settings.micro_batch_size + 1) if settings.batch_size % size == 0]
    steps = [sizes[0]]
    for size in sizes[1:]:
        if size >= 2 * steps[-1] or size == sizes[-1]:
            steps.append(size)
    return [*([(1, 0.125), (1, 0.25)] if small else []), *((size, 1.0) for size in steps)]


def _cut(row: Row, share: float) -> Row:
    length = max(1, round(len(row.ids) * share))
    return Row(row.ids[:length], row.labels[:length], row.positions[:length])


def _dry_run(trainee: Trainee, rows: Sequence[Row]) -> int | None:
    """Forward and backward; the process's peak in bytes, or None when memory was short."""
    memory.reset_peak()
    try:
        trainee.accumulate(rows, sum(len(row.ids) for row in rows))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return memory.peak()
    finally:
        trainee.drop_gradients()
    # Out of the handler: the exception's frames held the tensors.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what an allocator raises when memory is short."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in text for words in ("not enough memory", "can't allocate memory", "out of memory"))
    )
