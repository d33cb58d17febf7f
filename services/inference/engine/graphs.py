"""Steps over a few tokens as recordings: made once, then played with other numbers in the same memory.

A decode step on a GPU is a thousand kernels of a few microseconds each; for Python to start them takes longer than they
do. A CUDA graph starts them all with one call, but is bound to addresses and sizes. So all that tells one step from
another lies in memory of its own, and sizes are rounded up: sequences, tokens of each (one, and its guesses), blocks of
the longest, slots of adapters. What fills up writes to a block that nobody has, and no sequence sees it.

- Steps with a longer piece of a prompt, or that would be much larger than the cache, are not recorded.
- Steps on the base model have recordings without adapters, and pay nothing for them.
- Adapters are copied into slots and out of them between steps, by work in the same stream: recordings stay good. Only
  a stack with more slots than before wants new ones.

Off on a CPU, where starting a kernel is cheaper than its arithmetic. NOT YET RUN ON A GPU: tests play recordings on a
CPU, over the same memory (tests/unit/inference/tape.py); :class:`CudaGraphs` itself has only been read.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from services.core import log
from services.inference.adapters.indexed import Indexed, Memory
from services.inference.adapters.lora import Active, Segment
from services.inference.adapters.mix import Mix
from services.inference.engine.attention import Step
from services.inference.engine.blocks import BLOCK, blocks_for
from services.inference.engine.layout import Layout
from services.inference.engine.rows import Grid, Row

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs a function, and gives what does all that it did to memory again."""

_WIDEST = 16
"""Tokens of a sequence, guesses included, up to which a step is recorded."""
_TOKENS = 128
"""The same for all tokens: of more, the kernels themselves are what takes the time."""
_STACKS = 4
"""Stacks of adapters that a step may need; there is one for each rank that is usual."""
_SHORTEST = 16
"""Blocks that are read for each sequence at least: 256 tokens."""
_MOST = 48
"""Recordings that are kept; each has some megabytes. The longest unused one gives way."""
_USUAL = [(rows, 1, blocks) for rows in (1, 2, 4, 8, 16) for blocks in (64, 128)]
"""Made at the start: one token each behind a prompt of the usual size."""

_log = log.get("inference.engine")


@dataclass(frozen=True, slots=True)
class Bucket:
    """Steps that are the same recording."""

    rows: int
    """Sequences."""
    width: int
    """Tokens of each."""
    blocks: int
    """Of each one's table."""
    stacks: tuple[tuple[int, int, int], ...] = ()
    """(rank, slots in memory, slots in use) of each stack of adapters."""

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.rows * self.width


class CudaGraphs:
    """Records by CUDA, on the GPU of the calling thread. NOT YET RUN ON A GPU."""

    def __init__(self) -> None:
        # What lies in the pool is only good until another recording plays: results are copied out of it.
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        """See :data:`Record`."""
        here, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):  # libraries take their memory at the first call, which cannot be recorded
            compute()
        here.wait_stream(self._stream)
        # Only this thread's work is recorded, whatever others do meanwhile. The outer "with": where it fails, torch
        # leaves the thread in the recording's stream, and what came next would not wait for copies of adapters.
        with (
            torch.cuda.stream(here),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            compute()
        return graph.replay


class Graphs:
    """All recordings of a model. Used from the engine's thread only.

    Args:
        active: sets the adapters of a step.
        memory: of keys and values, ``[layers, 2, kv_heads, slots, head_dim]``; the last block is nobody's.
        record: makes a recording.
    """

    def __init__(self, model: PreTrainedModel, active: Active, memory: torch.Tensor, record: Record) -> None:
        self._model, self._active, self._memory, self._record = model, active, memory, record
        self._spare = memory.shape[3] // BLOCK - 1
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        device = model.device
        size = (4 + _STACKS) * _TOKENS + self._most_blocks
        self._numbers = torch.zeros(size, dtype=torch.int64, device=device)
        """All that a step is told."""
        self._outputs = torch.empty(_TOKENS, head.weight.shape[0], dtype=model.dtype, device=device)
        self._kept: OrderedDict[Bucket, Callable[[], None]] = OrderedDict()
        self._off = False
        self.beside = threading.Lock()
        """Held by who uses the GPU beside the steps; no recording is made meanwhile."""

    @property
    def _most_blocks(self) -> int:
        """That are read for all sequences: what is gathered of a layer is at most twice as large as the layer's."""
        return 2 * self._spare

    def __len__(self) -> int:
        return len(self._kept)

    @torch.inference_mode()
    def warm(self) -> None:
        """Makes the usual ones, so that no step has to."""
        for bucket in (Bucket(*sizes) for sizes in _USUAL):
            if bucket.rows * bucket.blocks <= self._most_blocks and not self._off:
                self._play(bucket, _numbers(bucket, Layout(), [], self._spare), [])

    def logits(self, layout: Layout) -> torch.Tensor | None:
        """``[last, embeddings]``, good until the next call; None for a step that is not recorded."""
        sizes = None if self._off else self._sizes(layout.rows)
        if sizes is None:
            return None
        stacks = self._active.index(layout.segments)
        if len(stacks) > _STACKS:
            return None
        bucket = Bucket(*sizes, tuple((memory.rank, memory.size, _up(max(slots) + 1)) for memory, slots in stacks))
        numbers = _numbers(bucket, layout, [slots for _, slots in stacks], self._spare)
        if layout.begun:
            self._memory.index_fill_(3, torch.tensor(layout.begun, device=self._memory.device), 0.0)
        if not self._play(bucket, numbers, [memory for memory, _ in stacks]):
            return None
        return self._outputs[: len(layout.last)]

    def _sizes(self, rows: list[Row]) -> tuple[int, int, int] | None:
        """(rows, width, blocks) of the bucket; None where there is none."""
        width, count = _up(max(row.count for row in rows)), _up(len(rows))
        if width > _WIDEST or count * width > _TOKENS:
            return None
        blocks = max(_SHORTEST, _up(max(blocks_for(row.past + row.count) for row in rows)))
        return (count, width, blocks) if count * blocks <= self._most_blocks else None

    def _play(self, bucket: Bucket, numbers: list[int], memories: list[Memory]) -> bool:
        """Computes a step; False when it cannot be recorded, as no other is from then on."""
        told = torch.tensor(numbers, pin_memory=self._numbers.device.type == "cuda")
        self._numbers[: len(numbers)].copy_(told, non_blocking=True)
        play = self._kept.pop(bucket, None)
        if play is None:
            try:
                with self.beside:
                    play = self._record(self._step(bucket, memories))
            except RuntimeError:
                _log.exception("a step cannot be recorded: they are slower from now on", bucket=str(bucket))
                self._kept.clear()
                self._off = True
                return False
            self._make_room(bucket)
        self._kept[bucket] = play
        play()
        return True

    def _make_room(self, bucket: Bucket) -> None:
        """For one more; those on a stack's memory of before hold on to it for nothing."""
        sizes = {rank: size for rank, size, _ in bucket.stacks}
        for old in list(self._kept):
            if any(sizes.get(rank, size) != size for rank, size, _ in old.stacks):
                del self._kept[old]
        while len(self._kept) >= _MOST:
            self._kept.popitem(last=False)

    def _step(self, bucket: Bucket, memories: list[Memory]) -> Callable[[], None]:
        """The bucket's step, which reads its numbers and writes its outputs in memory that stays."""
        kv, tokens, at = list(self._memory.unbind()), bucket.tokens, 5 * bucket.tokens + bucket.rows * bucket.blocks
        ids, positions, slots, last = self._numbers[: 4 * tokens].view(4, tokens).unbind()
        tables = self._numbers[4 * tokens : at - tokens].view(bucket.rows, bucket.blocks)
        stacked = []
        for memory, (_, _, used) in zip(memories, bucket.stacks, strict=True):
            stacked.append((memory, used, self._numbers[at - tokens : at]))
            at += tokens

        def compute() -> None:
            mix = Mix(stacked=[Indexed(*one) for one in stacked]) if stacked else None
            grid = Grid(positions.view(bucket.rows, bucket.width), tables)
            with self._active.mixed(mix):
                logits = self._model(
                    input_ids=ids[None],
                    position_ids=positions[None],
                    use_cache=False,
                    logits_to_keep=last,
                    step=Step(batches=[], rows=[], slots=slots, begun=None, kv=kv, grid=grid),
                ).logits
            self._outputs[:tokens].copy_(logits[0])

        return compute


def _numbers(bucket: Bucket, layout: Layout, stacks: list[list[int]], spare: int) -> list[int]:
    """All that a bucket's step is told: ids, positions, slots, whose outputs are wanted, tables, slots of adapters.

    Args:
        stacks: for each, the slot of every segment; -1 for none.
        spare: the block that is nobody's.
    """
    tokens, width = bucket.tokens, bucket.width
    ids, positions, slots, last = [0] * tokens, [0] * tokens, [spare * BLOCK] * tokens, [0] * tokens
    places, tables = list[int](), list[int]()
    for number, row in enumerate(layout.rows):
        here, there = slice(row.begin, row.begin + row.count), slice(number * width, number * width + row.count)
        ids[there], positions[there], slots[there] = layout.ids[here], layout.positions[here], layout.slots[here]
        places += range(there.start, there.stop)
        # Filled up with its own: what another one's blocks hold may be no number.
        table = row.blocks[: blocks_for(row.past + row.count)]
        tables += table + table[-1:] * (bucket.blocks - len(table))
    tables += [spare] * (bucket.rows * bucket.blocks - len(tables))
    last[: len(layout.last)] = [places[token] for token in layout.last]
    adapters = [_owners(layout.segments, mine, places, tokens) for mine in stacks]
    return [*ids, *positions, *slots, *last, *tables, *(slot for owners in adapters for slot in owners)]


def _owners(segments: list[Segment], slots: list[int], places: list[int], tokens: int) -> list[int]:
    """The slot of every token of a step."""
    owners = [-1] * tokens
    for segment, slot in zip(segments, slots, strict=True):
        for token in range(segment.begin, segment.end):
            owners[places[token]] = slot
    return owners


def _up(count: int) -> int:
    """The power of two that is not below."""
    return 1 << (count - 1).bit_length()
