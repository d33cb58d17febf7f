"""The sequences of a step: which keys and values each of them sees, alone or as many alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch

from services.inference.engine.blocks import BLOCK, blocks_for

_ALIKE = 2
"""Decodes share one operation when the longest has at most so many times the blocks of the shortest: it computes all of
them as long as the longest."""
_MANY = 4
"""Fewer are quicker one by one: their blocks need not be gathered."""


@dataclass(slots=True)
class Row:
    """One sequence's part of a step."""

    begin: int
    """Its first token among the step's."""
    count: int
    """Its tokens in this step."""
    past: int
    """Its tokens of earlier steps."""
    blocks: list[int]
    """Where its keys and values lie."""
    _slots: slice | torch.Tensor | None = None
    _masks: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)
    _hidden: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def written(self) -> list[int]:
        """The slots of its tokens in this step."""
        return [self.blocks[at // BLOCK] * BLOCK + at % BLOCK for at in range(self.past, self.past + self.count)]

    def begun(self) -> range:
        """The slots behind its last token, if this step is the first to write to their block.

        They are cleared: a mask takes away any number, but not what is none, and another sequence may have left that.
        """
        end = self.past + self.count
        block = (end - 1) // BLOCK
        slot = self.blocks[block] * BLOCK
        return range(slot + end - block * BLOCK, slot + BLOCK) if block * BLOCK >= self.past else range(0)

    def seen(self, memory: torch.Tensor, window: int | None) -> torch.Tensor:
        """Keys (or values) that any of its tokens sees, ``[1, kv_heads, seen, head_dim]``.

        They are read in place where its blocks are neighbours, else gathered.

        Args:
            memory: ``[kv_heads, slots, head_dim]``.
            window: tokens that each sees at most, itself included; None for all.
        """
        if self._slots is None:
            self._slots = self._locate(memory.device)
        first = self._first(window)
        if isinstance(self._slots, slice):
            return memory[None, :, self._slots.start + first : self._slots.stop]
        return memory.index_select(1, self._slots[first:])[None]

    def mask(self, window: int | None, device: torch.device, repeated: int = 1) -> torch.Tensor:
        """Which of these each of its tokens sees: ``[repeated * count, seen]``, bool; made once for all layers."""
        if (mask := self._masks.get((window, repeated))) is None:
            end = self.past + self.count
            queries = torch.arange(self.past, end, device=device)[:, None]
            keys = torch.arange(self._first(window), end, device=device)[None]
            mask = keys <= queries
            if window is not None:
                mask &= keys > queries - window
            mask = self._masks[window, repeated] = mask.repeat(repeated, 1)
        return mask

    def hidden(self, window: int | None, device: torch.device) -> torch.Tensor:
        """What takes away the scores of what its tokens do not see, made once for all layers.

        ``[count, the last of what is seen]``, bfloat16: 0 or minus infinity. Without a window, all see what was before.
        """
        if window not in self._hidden:
            mask = self.mask(window, device)
            if window is None:
                mask = mask[:, self.past :]
            zeros = torch.zeros(mask.shape, dtype=torch.bfloat16, device=device)
            self._hidden[window] = zeros.masked_fill_(~mask, -torch.inf)
        return self._hidden[window]

    def _first(self, window: int | None) -> int:
        return 0 if window is None else max(0, self.past + 1 - window)

    def _locate(self, device: torch.device) -> slice | torch.Tensor:
        end = self.past + self.count
        blocks = self.blocks[: blocks_for(end)]
        if all(after == before + 1 for before, after in pairwise(blocks)):
            return slice(blocks[0] * BLOCK, blocks[0] * BLOCK + end)
        return (torch.tensor(blocks, device=device)[:, None] * BLOCK + torch.arange(BLOCK, device=device)).flatten()[
            :end
        ]


@dataclass(slots=True)
class Batch:
    """Sequences that decode, one token each: one operation for all of them is worth gathering their blocks."""

    tokens: torch.Tensor
    """Theirs among the step's, ``[sequences]``, int64."""
    rows: list[Row]
    _gathered: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def seen(self, memory: torch.Tensor, window: int | None) -> torch.Tensor:
        """Keys (or values), ``[sequences, kv_heads, seen, head_dim]``; see :meth:`Row.seen` and :meth:`mask`."""
        kv_heads, slots, head_dim = memory.shape
        if window not in self._gathered:
            self._gathered[window] = self._gather(window, kv_heads, slots // BLOCK, memory.device)
        found = memory.view(-1, BLOCK * head_dim).index_select(0, self._gathered[window][0])
        return found.view(len(self.rows), kv_heads, -1, head_dim)

    def mask(self, window: int | None) -> torch.Tensor:
        """Which of these each sequence sees: ``[sequences, 1, 1, seen]``, bool."""
        return self._gathered[window][1]

    def _gather(
        self, window: int | None, kv_heads: int, blocks: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks of all heads, as rows of the memory, and the mask."""
        firsts = [0 if window is None else max(0, row.past + 1 - window) // BLOCK for row in self.rows]
        tables = [row.blocks[first : row.past // BLOCK + 1] for row, first in zip(self.rows, firsts, strict=True)]
        longest = max(len(table) for table in tables)
        wanted = torch.tensor([table + table[-1:] * (longest - len(table)) for table in tables], device=device)
        heads = torch.arange(kv_heads, device=device)[None, :, None] * blocks
        past = torch.tensor([row.past for row in self.rows], device=device)[:, None]
        at = torch.tensor(firsts, device=device)[:, None] * BLOCK + torch.arange(longest * BLOCK, device=device)
        mask = at <= past
        if window is not None:
            mask &= at > past - window
        return (heads + wanted[:, None]).flatten(), mask[:, None, None]


@dataclass(slots=True)
class Grid:
    """Sequences with as many tokens each, known by what is in memory when they are computed: so the same operations on
    the same memory do for any others, and none of them asks the host."""

    positions: torch.Tensor
    """Of each one's tokens, ``[sequences, tokens of each]``, int64."""
    tables: torch.Tensor
    """Blocks of each, ``[sequences, blocks]``, int64; what fills up a row
    has to hold numbers: a mask takes away any, but not what is none."""
    _wanted: torch.Tensor | None = None
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def seen(self, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, ``[sequences, kv_heads, seen, head_dim]``; of a layer, as :attr:`Step.kv` has it."""
        _, kv_heads, slots, head_dim = kv.shape
        sequences, blocks = self.tables.shape
        if self._wanted is None:
            heads = torch.arange(2 * kv_heads, device=kv.device).view(2, 1, kv_heads, 1) * (slots // BLOCK)
            self._wanted = (heads + self.tables[None, :, None]).flatten()
        found = kv.view(-1, BLOCK * head_dim).index_select(0, self._wanted)
        keys, values = found.view(2, sequences, kv_heads, blocks * BLOCK, head_dim).unbind()
        return keys, values

    def mask(self, window: int | None, repeated: int, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores, ``[sequences, 1, repeated * tokens of each, seen]``: 0 or minus infinity."""
        if window not in self._masks:
            at = torch.arange(self.tables.shape[1] * BLOCK, device=self.tables.device)
            hidden = at > self.positions[:, :, None]
            if window is not None:
                hidden |= at <= self.positions[:, :, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            self._masks[window] = mask.repeat(1, repeated, 1)[:, None]
        return self._masks[window]


def batches(rows: list[Row], device: torch.device) -> tuple[list[Batch], list[Row]]:
    """The decodes that are alike enough, and the rows that stay alone."""
    alone = [row for row in rows if row.count > 1]
    groups: list[list[Row]] = []
    for row in sorted((row for row in rows if row.count == 1), key=lambda row: len(row.blocks)):
        if groups and len(row.blocks) <= _ALIKE * len(groups[-1][0].blocks):
            groups[-1].append(row)
        else:
            groups.append([row])
    made = []
    for group in groups:
        if len(group) < _MANY:
            alone += group
        else:
            made.append(Batch(torch.tensor([row.begin for row in group], device=device), group))
    return made, alone
