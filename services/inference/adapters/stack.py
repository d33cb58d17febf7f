"""Slots of adapters in memory, for layers that multiply with many of them at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any

import torch

from services.inference.adapters.indexed import Memory

if TYPE_CHECKING:
    from services.inference.adapters.lora import Weights

_ON_CPU, _ON_DEVICE = 16, 8
"""Slots of a new stack. On a CPU memory is only taken when one is filled, so that all versions in use have theirs."""

Paths = tuple[str, ...]
"""Layers with the same input, by module path."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of layers with the same input."""

    width: int
    """Of the input."""
    outs: tuple[int, ...]
    """Of their outputs."""

    @property
    def piece(self) -> int:
        """The largest size into pieces of which all outputs can be cut."""
        return gcd(*self.outs)

    @property
    def owners(self) -> list[int]:
        """The layer of each piece, as an index."""
        return [layer for layer, out in enumerate(self.outs) for _ in range(out // self.piece)]


class Stack:
    """Slots of adapters up to a rank; those that were not mixed for longest give way.

    An adapter is copied into its slot before it serves, from the thread that makes it ready (:meth:`stage`): that takes
    longer than a step may wait. Only for one that had to give way since, or was never staged, the step waits.
    """

    def __init__(self, rank: int, groups: Mapping[Paths, Shape]) -> None:
        self._rank, self._groups = rank, groups
        self.a: dict[Paths, torch.Tensor] = {}
        """``[slots, layers * rank, in]``, in the type that the adapters' numbers are exact in"""
        self.b: dict[Paths, torch.Tensor] = {}
        """``[slots, pieces, rank, piece]``: in pieces of one size, all layers are one batched product."""
        self.owners: dict[Paths, torch.Tensor | None] = {}
        """The layer of each piece, int64; None where a layer is a piece."""
        self.arrays: dict[Paths, tuple[Any, Any, Any]] = {}
        """The memory of a and b as the compiled product takes it, bfloat16 as uint16, and the layer of each piece; on a
        CPU only."""
        self._slots: dict[str, int] = {}
        """By digest, the longest unmixed first."""
        self._size = 0
        self._mixed: set[str] = set()
        """Those of the step in progress, which may read them at any time."""
        self._held: list[str] = []
        """Those that are read beside the steps."""
        self._filling: int | None = None
        """The slot that is being filled beside the steps."""
        self._lock = threading.Lock()
        self._one_at_a_time = threading.Lock()

    def place(self, adapters: list[Weights]) -> list[int]:
        """Each one's slot, for the next step; none of them loses it to another until then. From the engine's thread."""
        with self._lock:
            self._mixed = {weights.digest for weights in adapters}
            for weights in adapters:
                slot = self._slots.pop(weights.digest, None)
                if slot is None:
                    slot = self._free(weights)
                    _fill(self._groups, self.a, self.b, slot, weights)
                self._slots[weights.digest] = slot
            return [self._slots[weights.digest] for weights in adapters]

    def stage(self, weights: Weights) -> None:
        """Copies an adapter into a slot that no step reads; from any thread, beside the steps."""
        with self.held(weights):
            pass

    @contextmanager
    def held(self, weights: Weights) -> Iterator[int]:
        """The slot that an adapter lies in, copied there if need be, and no other's until the end of the context; from
        any thread, beside the steps."""
        with self._one_at_a_time:
            while (slot := self._try_to_stage(weights)) is None:
                pass
        try:
            yield slot
        finally:
            with self._lock:
                self._held.remove(weights.digest)

    def _try_to_stage(self, weights: Weights) -> int | None:
        """The slot that it lies in now and is held in; None when a step needed more slots meanwhile, whose memory is
        another one."""
        with self._lock:
            if (slot := self._slots.get(weights.digest)) is not None:
                self._held.append(weights.digest)
                return slot
            slot = self._filling = self._free(weights)
            a, b = self.a, self.b
        try:
            _fill(self._groups, a, b, slot, weights)
        except BaseException:
            with self._lock:
                self._filling = None
            raise
        with self._lock:
            self._filling = None
            if self.a is not a:
                return None
            self._slots[weights.digest] = slot
            self._held.append(weights.digest)
            return slot

    def memory(self) -> Memory:
        """What the slots lie in now: those that :meth:`place` gave lie there in any that comes after it."""
        with self._lock:
            return Memory(self._rank, self._size, self.a, self.b, self.owners)

    def slot(self, weights: Weights) -> int | None:
        """Where it lies; None when it does not."""
        return self._slots.get(weights.digest)

    def _free(self, like: Weights) -> int:
        """A slot for one more. The caller holds the lock."""
        taken = set(self._slots.values()) | ({self._filling} - {None})
        if len(taken) == self._size:
            used = {*self._mixed, *self._held}
            oldest = next((digest for digest in self._slots if digest not in used), None)
            if oldest is not None:
                return self._slots.pop(oldest)
            self._grow(like)
        return min(set(range(self._size)) - taken)

    def _grow(self, like: Weights) -> None:
        """Twice the slots. The step in progress goes on with the old ones."""
        first = next(iter(like.layers.values()))[0]
        least = _ON_CPU if like.on_cpu else _ON_DEVICE
        before, self._size = self._size, max(least, 2 * self._size)
        grown_a, grown_b = dict[Paths, torch.Tensor](), dict[Paths, torch.Tensor]()
        owned = dict[Paths, torch.Tensor | None]()
        for paths, shape in self._groups.items():
            owners = torch.tensor(shape.owners, device=first.device)
            a = first.new_empty(self._size, len(paths) * self._rank, shape.width, dtype=like.dtype)
            b = first.new_empty(self._size, len(owners), self._rank, shape.piece, dtype=like.dtype)
            if before:
                a[:before], b[:before] = self.a[paths], self.b[paths]
            grown_a[paths], grown_b[paths] = a, b
            owned[paths] = owners if len(owners) > len(paths) else None
            if like.on_cpu:
                self.arrays[paths] = _array(a), _array(b), owners.numpy()
        self.a, self.b, self.owners = grown_a, grown_b, owned


def _array(memory: torch.Tensor) -> Any:
    return memory.view(torch.uint16).numpy() if memory.dtype == torch.bfloat16 else memory.numpy()


def _fill(
    groups: Mapping[Paths, Shape],
    a: Mapping[Paths, torch.Tensor],
    b: Mapping[Paths, torch.Tensor],
    slot: int,
    weights: Weights,
) -> None:
    """Copies an adapter into a slot of a stack's memory."""
    for paths, shape in groups.items():
        stack_rank = b[paths].shape[2]
        pieces = torch.split_with_sizes(b[paths][slot], [out // shape.piece for out in shape.outs])
        for part, (path, to_b) in enumerate(zip(paths, pieces, strict=True)):
            to_a = a[paths][slot, part * stack_rank : (part + 1) * stack_rank]
            rank = 0
            if (pair := weights.layers.get(path)) is not None:
                rank = pair[0].shape[0]
                to_a[:rank] = pair[0]
                torch.mul(pair[1].view(-1, shape.piece, rank).mT, weights.scale, out=to_b[:, :rank])
            if rank < stack_rank:
                to_a[rank:], to_b[:, rank:] = 0.0, 0.0
