"""The adapters of one step, as few operations as can be: stacked, or one by one where a part of the step is large.

An adapter's two products of a few tokens are cheap, calling torch for each adapter, layer and part is not. So adapters
that are mixed in a step have slots in stacks, and each layer has one product for all of them: torch's batched one, or
on a CPU a compiled one, which is also quicker than torch's for one adapter and many tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from services.inference.adapters.indexed import Indexed, Memory
from services.inference.adapters.stack import Paths, Shape, Stack
from services.inference.engine import kernels

if TYPE_CHECKING:
    from services.inference.adapters.lora import Segment, Weights
    from services.inference.engine.few import Sheet

_FEW = 8
"""Tokens of a segment up to which torch's product takes it from a stack, where all are padded to the longest."""
_RANKS = (8, 16, 32, 64)
"""Each has a stack of its own, so that one adapter of rank 64 does not make all others four times as large."""


@dataclass(frozen=True, slots=True)
class Stacked:
    """Segments of a step whose adapters lie in one stack."""

    stack: Stack
    slots: slice
    """From the first to the last in use."""
    sources: torch.Tensor
    """The token of every place ``[slots * longest]``, int64; any where there is none."""
    places: torch.Tensor | None
    """The places that have a token; None for all of them."""
    tokens: torch.Tensor
    """Their tokens."""
    span: slice | None
    """The tokens in the order of the places, if they are so: nothing has to be gathered. See :meth:`Mixer.order`."""

    def add(self, paths: Paths, x: torch.Tensor, y: torch.Tensor) -> None:
        """See :meth:`Mix.add`."""
        a = self.stack.a[paths][self.slots]
        gathered = x.index_select(0, self.sources) if self.span is None else x[self.span]
        inputs = gathered.view(a.shape[0], -1, a.shape[2])
        count, longest = inputs.shape[:2]
        ranks = torch.bmm(inputs.to(a.dtype), a.mT).view(count, longest, len(paths), -1).transpose(1, 2)
        if (owners := self.stack.owners[paths]) is not None:
            ranks = ranks.index_select(1, owners)
        b = self.stack.b[paths][self.slots]
        pieces = torch.bmm(ranks.flatten(0, 1), b.flatten(0, 1)).view(count, b.shape[1], longest, -1)
        out = pieces.transpose(1, 2).reshape(count * longest, -1)
        if self.span is not None:
            y[self.span] += out
            return
        y.index_add_(0, self.tokens, (out if self.places is None else out[self.places]).to(y.dtype))


@dataclass(frozen=True, slots=True)
class Placed:
    """Tokens of a step, on a CPU, whose adapters lie in one stack."""

    stack: Stack
    slots: Any
    """Each token's up to the last of these, int64; -1 for those whose adapters lie elsewhere."""

    def add(self, paths: Paths, x: torch.Tensor, y: torch.Tensor) -> None:
        """See :meth:`Mix.add`."""
        out = y.float()  # mostly y itself
        self.onto(paths, x.float().contiguous().numpy(), out.numpy())
        if out is not y:
            y.copy_(out)

    def onto(self, paths: Paths, x: Any, y: Any) -> None:
        """The same with arrays of float32, without gaps."""
        a, b, owners = self.stack.arrays[paths]
        if len(self.slots) > 1 and (threads := kernels.threads()) > 1:
            kernels.adapt_in_threads(x, y, a, b, owners, self.slots, threads)
        else:
            kernels.adapt(x, y, a, b, owners, self.slots)


@dataclass(frozen=True, slots=True)
class Mix:
    """The adapters of one step."""

    alone: list[Segment] = field(default_factory=list)
    stacked: Sequence[Stacked | Placed | Indexed] = ()

    def add(self, paths: Paths, x: torch.Tensor, y: torch.Tensor, outs: tuple[int, ...]) -> None:
        """Adds what the adapters give.

        Args:
            x: ``[tokens, in]``.
            y: the outputs of the layers at these paths side by side, ``[tokens, sum of outs]``.
        """
        for segment in self.alone:
            add_one(segment.weights, paths, x[segment.begin : segment.end], y[segment.begin : segment.end], outs)
        for stacked in self.stacked:
            stacked.add(paths, x, y)

    def add_few(self, paths: Paths, x: Sheet, y: Sheet) -> None:
        """As :meth:`add`, on a CPU where all adapters lie in stacks."""
        for stacked in self.stacked:
            assert isinstance(stacked, Placed)
            stacked.onto(paths, x.array, y.array)


def add_one(weights: Weights, paths: Paths, x: torch.Tensor, y: torch.Tensor, outs: tuple[int, ...]) -> None:
    """Adds what one adapter gives to all of these tokens; see :meth:`Mix.add`."""
    pairs, begin = [weights.layers.get(path) for path in paths], 0
    joint = weights.joints.get(paths)
    if joint is None:  # it has some of these layers only
        ranks = [x.to(pair[0].dtype) @ pair[0].T for pair in pairs if pair]
    else:
        sizes = [pair[0].shape[0] for pair in pairs if pair]
        ranks = list(torch.split_with_sizes(x.to(joint.dtype) @ joint, sizes, 1))
    for pair, out in zip(pairs, outs, strict=True):
        if pair is not None:
            h, b, part = ranks.pop(0), pair[1].T, y[:, begin : begin + out]
            if part.dtype == b.dtype:
                part.addmm_(h, b, alpha=weights.scale)
            else:
                part += (h @ b) * weights.scale
        begin += out


class Mixer:
    """Arranges steps, and keeps the stacks between them. The engine's thread mixes; any other may stage.

    Args:
        groups: the layers of the model.
        compiled: whether adapters in stacks are computed by our own product on a CPU, which takes less than torch's for
            any number of tokens.
    """

    def __init__(self, groups: Mapping[Paths, Shape], *, compiled: bool = True) -> None:
        self._groups, self._compiled = groups, compiled
        self._stacks: dict[int, Stack] = {}

    def mix(self, segments: list[Segment]) -> Mix:
        """What a step with these segments needs."""
        compiled = self._is_compiled(segments[0].weights)
        alone: list[Segment] = []
        by_rank: dict[int, list[Segment]] = {}
        for segment in segments:
            if segment.end - segment.begin > _FEW and not compiled:
                alone.append(segment)
            else:
                by_rank.setdefault(_stack_rank(segment.weights), []).append(segment)
        stacked = list[Stacked | Placed]()
        for rank, mine in by_rank.items():
            if compiled:
                stacked.append(_placed(self._stack(rank), mine))
            elif (made := _stacked(self._stack(rank), mine)) is not None:
                stacked.append(made)
            else:
                alone += mine
        return Mix(alone, stacked)

    @contextmanager
    def beside(self, segment: Segment) -> Iterator[Mix]:
        """What one adapter needs from any thread, beside the steps: as a step would have it."""
        if not self._is_compiled(segment.weights):
            yield Mix(alone=[segment])
            return
        stack = self._stack(_stack_rank(segment.weights))
        with stack.held(segment.weights) as slot:
            slots = np.full(segment.end, -1, np.int64)
            slots[segment.begin :] = slot
            yield Mix(stacked=[Placed(stack, slots)])

    def index(self, segments: list[Segment]) -> list[tuple[Memory, list[int]]]:
        """The stacks of a recorded step's adapters, and in each the slot of every segment, -1 for those of others."""
        found = []
        for rank in sorted({_stack_rank(segment.weights) for segment in segments}):
            mine = [segment.weights for segment in segments if _stack_rank(segment.weights) == rank]
            placed = iter(self._stack(rank).place(mine))
            slots = [next(placed) if _stack_rank(segment.weights) == rank else -1 for segment in segments]
            found.append((self._stack(rank).memory(), slots))
        return found

    @torch.inference_mode()  # as the steps, whose tensors these are too
    def stage(self, weights: Weights) -> None:
        """Makes an adapter ready to be mixed with others; from any thread, beside the steps."""
        self._stack(_stack_rank(weights)).stage(weights)

    def order(self, weights: Weights | None) -> tuple[int, int, int]:
        """Where a sequence of such an adapter stands best in a step: beside those of its stack, as its slots lie."""
        if weights is None:
            return 0, 0, 0
        rank = _stack_rank(weights)
        slot = self._stacks[rank].slot(weights) if rank in self._stacks else None
        return rank, slot if slot is not None else 2**31, id(weights)

    def _is_compiled(self, weights: Weights) -> bool:
        return self._compiled and weights.on_cpu

    def _stack(self, rank: int) -> Stack:
        return self._stacks.setdefault(rank, Stack(rank, self._groups))


def _placed(stack: Stack, segments: list[Segment]) -> Placed:
    """The segments on a stack, where each adapter lies afterwards: one that was never staged is copied."""
    slots = np.full(segments[-1].end, -1, np.int64)
    for segment, slot in zip(segments, stack.place([segment.weights for segment in segments]), strict=True):
        slots[segment.begin : segment.end] = slot
    return Placed(stack, slots)


def _stacked(stack: Stack, segments: list[Segment]) -> Stacked | None:
    """The segments on a stack; None for a single one, and when their slots are so far apart that most of the products
    would be for nobody."""
    if len(segments) == 1:
        return None
    slots = stack.place([segment.weights for segment in segments])
    first, end = min(slots), max(slots) + 1
    if end - first > 2 * len(slots):
        return None
    by_slot: dict[int, list[int]] = {slot: [] for slot in range(first, end)}
    for slot, segment in zip(slots, segments, strict=True):
        by_slot[slot] += range(segment.begin, segment.end)
    longest = max(len(tokens) for tokens in by_slot.values())
    tokens = [token for mine in by_slot.values() for token in mine]
    sources = [token for mine in by_slot.values() for token in mine + tokens[:1] * (longest - len(mine))]
    places = [at * longest + n for at, mine in enumerate(by_slot.values()) for n in range(len(mine))]
    device = stack.a[next(iter(stack.a))].device
    return Stacked(
        stack,
        slice(first, end),
        torch.tensor(sources, device=device),
        torch.tensor(places, device=device) if len(places) < len(sources) else None,
        torch.tensor(tokens, device=device),
        slice(tokens[0], tokens[-1] + 1) if sources == list(range(tokens[0], tokens[-1] + 1)) else None,
    )


def _stack_rank(weights: Weights) -> int:
    return next((rank for rank in _RANKS if rank >= weights.rank), weights.rank)
