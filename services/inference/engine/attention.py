"""Attention over keys and values that the runner owns, for every architecture of transformers.

transformers gives the architecture; through its attention interface each layer's queries, keys and values come here
with the tokens of all sequences of a step side by side, and each sequence attends to its own only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "codegraft"


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of a step."""

    begin: int
    """Its first token among the step's."""
    count: int
    """Its tokens in this step."""
    past: int
    """Its tokens of earlier steps."""
    kv: torch.Tensor
    """Its keys and values, ``[layers, 2, kv_heads, capacity, head_dim]``; the step's are written behind the past."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    rows: list[Row],
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention.

    Args:
        query: ``[1, heads, tokens, head_dim]``; key and value have kv_heads instead of heads.
        rows: the step's sequences, which together cover all tokens.
        sliding_window: tokens that a position sees at most, itself included; None for all.

    Returns:
        ``[1, tokens, heads, head_dim]``, and no weights.
    """
    heads, kv_heads, tokens, head_dim = query.shape[1], key.shape[1], query.shape[2], query.shape[3]
    out = query.new_empty(1, tokens, heads, head_dim)
    for row in rows:
        span, end = slice(row.begin, row.begin + row.count), row.past + row.count
        keys, values = row.kv[module.layer_idx]  # type: ignore[index]
        keys[:, row.past : end] = key[0, :, span]
        values[:, row.past : end] = value[0, :, span]
        first = 0 if sliding_window is None else max(0, row.past + 1 - sliding_window)
        keys, values = keys[None, :, first:end], values[None, :, first:end]
        if row.count == 1:  # the heads of a group become its queries: nothing is repeated, no mask is needed
            grouped = query[0, :, row.begin].view(1, kv_heads, heads // kv_heads, head_dim)
            out[0, row.begin] = scaled_dot_product_attention(grouped, keys, values, scale=scaling).view(heads, head_dim)
            continue
        attended = scaled_dot_product_attention(
            query[:, :, span],
            keys.repeat_interleave(heads // kv_heads, dim=1),
            values.repeat_interleave(heads // kv_heads, dim=1),
            attn_mask=_mask(row, first, sliding_window),
            scale=scaling,
        )
        out[0, span] = attended[0].transpose(0, 1)
    return out, None


def _mask(row: Row, first: int, sliding_window: int | None) -> torch.Tensor:
    """Which keys each of the row's queries sees: ``[count, keys]``, bool."""
    end = row.past + row.count
    queries = torch.arange(row.past, end, device=row.kv.device)[:, None]
    keys = torch.arange(first, end, device=row.kv.device)[None]
    seen = keys <= queries
    return seen if sliding_window is None else seen & (keys > queries - sliding_window)


def _no_mask(*_: Any, **__: Any) -> None:
    """Rows say what is seen; a mask over the whole step would be wrong."""


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)
