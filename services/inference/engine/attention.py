"""Attention over keys and values in blocks that the runner owns, for every architecture of transformers.

transformers gives the architecture; through its attention interface each layer's queries, keys and values come here
with the tokens of all sequences of a step side by side, and each sequence attends to its own only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "codegraft"
_FEW = 16
"""Up to so many tokens of a sequence, the heads of a group become queries of one: their keys are read once for all, a
third faster for 5 tokens after 1,000 (with 64 it makes no difference, and the mask would grow with the group)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of a step."""

    begin: int
    """Its first token among the step's."""
    count: int
    """Its tokens in this step."""
    past: int
    """Its tokens of earlier steps."""
    slots: slice | torch.Tensor
    """Where the keys and values of its tokens lie, earlier ones first: a slice where they are neighbours, which is read
    in place; else their indices ``[past + count]``, int64, which are gathered."""
    masks: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)
    """By sliding window and repetition; the first layer makes them for all."""


@dataclass(frozen=True, slots=True)
class Step:
    """The sequences of a step, and the memory of all layers."""

    rows: list[Row]
    """Together they cover all tokens."""
    slots: torch.Tensor
    """Where the step's keys and values go: ``[tokens]``, int64."""
    kv: list[torch.Tensor]
    """Keys and values by layer: ``[2, kv_heads, slots, head_dim]``, 16 slots a block. Each head's lie together, so that
    neighbouring blocks are one matrix."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    step: Step,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention.

    Args:
        query: ``[1, heads, tokens, head_dim]``; key and value have kv_heads instead of heads.
        sliding_window: tokens that a position sees at most, itself included; None for all.
        softcap: bound of the scores, which a hyperbolic tangent keeps within it (Gemma 2).

    Returns:
        ``[1, tokens, heads, head_dim]``, and no weights.
    """
    kv = step.kv[module.layer_idx]  # type: ignore[index]
    kv[0].index_copy_(1, step.slots, key[0])
    kv[1].index_copy_(1, step.slots, value[0])
    outputs = []
    for row in step.rows:
        queries = query[:, :, row.begin : row.begin + row.count]
        keys, values = (_seen(row, memory, sliding_window)[None] for memory in kv)
        if softcap is None:
            attended = _attend(row, queries, keys, values, scaling, sliding_window)
        else:
            attended = _attend_capped(row, queries, keys, values, scaling, sliding_window, softcap)
        outputs.append(attended.transpose(1, 2))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None


def _attend(
    row: Row, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    """One sequence: ``[1, heads, count, head_dim]``, keys and values ``[1, kv_heads, seen, head_dim]``."""
    heads, kv_heads = query.shape[1], keys.shape[1]
    if row.count <= _FEW:
        group = heads // kv_heads
        grouped = query.reshape(1, kv_heads, group * row.count, -1)
        mask = None if row.count == 1 else _mask(row, window, keys.device, repeated=group)
        return scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling).view(query.shape)
    causal = row.past == 0 and (window is None or row.count <= window)
    return scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=None if causal else _mask(row, window, keys.device),
        is_causal=causal,
        scale=scaling,
        enable_gqa=heads != kv_heads,
    )


def _attend_capped(
    row: Row,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
    window: int | None,
    cap: float,
) -> torch.Tensor:
    """The same by its definition: scaled_dot_product_attention has no cap."""
    group = query.shape[1] // keys.shape[1]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    scores = query @ keys.repeat_interleave(group, dim=1).mT * scale
    scores = (scores / cap).tanh() * cap
    scores = scores.masked_fill(~_mask(row, window, keys.device), -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ values.repeat_interleave(group, dim=1)


def _seen(row: Row, memory: torch.Tensor, window: int | None) -> torch.Tensor:
    """Keys (or values) that any of the row's queries sees, of ``[kv_heads, slots, head_dim]``."""
    first = _first(row, window)
    if isinstance(row.slots, slice):
        return memory[:, row.slots.start + first : row.slots.stop]
    return memory.index_select(1, row.slots[first:])


def _first(row: Row, window: int | None) -> int:
    return 0 if window is None else max(0, row.past + 1 - window)


def _mask(row: Row, window: int | None, device: torch.device, repeated: int = 1) -> torch.Tensor:
    """Which keys each of the row's queries sees: ``[repeated * count, seen]``, bool."""
    if (mask := row.masks.get((window, repeated))) is None:
        end = row.past + row.count
        queries = torch.arange(row.past, end, device=device)[:, None]
        keys = torch.arange(_first(row, window), end, device=device)[None]
        mask = keys <= queries
        if window is not None:
            mask &= keys > queries - window
        mask = row.masks[window, repeated] = mask.repeat(repeated, 1)
    return mask


def _no_mask(*_: Any, **__: Any) -> None:
    """Rows say what is seen; a mask over the whole step would be wrong."""


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)
