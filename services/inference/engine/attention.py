"""Attention over keys and values in blocks that the runner owns, for every architecture of transformers.

transformers gives the architecture; through its attention interface each layer's queries, keys and values come here
with the tokens of all sequences of a step side by side, and each sequence attends to its own only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from services.core.models.weights import quick_dtype
from services.inference.engine.rows import Batch, Grid, Row

if TYPE_CHECKING:
    from services.inference.engine.few import Few

NAME = "codegraft"
_FEW = 16
"""Up to so many tokens of a sequence, the heads of a group become queries of one: their keys are read once for all, a
third faster for 5 tokens after 1,000 (with 64 it makes no difference, and the mask would grow with the group)."""


@dataclass(frozen=True, slots=True)
class Step:
    """The sequences of a step, and the memory of all layers."""

    batches: list[Batch]
    rows: list[Row]
    """Together with the batches they cover all tokens."""
    slots: torch.Tensor
    """Where the step's keys and values go: ``[tokens]``, int64."""
    begun: torch.Tensor | None
    """Slots to be cleared, see :meth:`Row.begun`; int64."""
    kv: list[torch.Tensor]
    """Keys and values by layer: ``[2, kv_heads, slots, head_dim]``, 16 slots a block. Each head's lie together, so that
    neighbouring blocks are one matrix."""
    few: Few | None = None
    """The same for the compiled kernels, where they are quicker."""
    between: Callable[[], None] | None = None
    """Called before each layer."""
    grid: Grid | None = None
    """In place of batches and rows, all of whose numbers lie in memory: see engine/graphs.py."""


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
    """One layer's attention, called by transformers.

    Args:
        query: ``[1, heads, tokens, head_dim]``; key and value have kv_heads instead of heads.
        sliding_window: tokens that a position sees at most, itself included; None for all.
        softcap: bound of the scores, which a hyperbolic tangent keeps within it (Gemma 2).

    Returns:
        ``[1, tokens, heads, head_dim]``, and no weights.
    """
    kv = step.kv[module.layer_idx]  # type: ignore[index]
    keep(torch.cat([key[0], value[0]]).to(kv.dtype), kv, step)
    seen = look(query[0], kv, step, scaling, sliding_window, softcap)
    return seen[None].to(query.dtype), None


def keep(fresh: torch.Tensor, kv: torch.Tensor, step: Step) -> None:
    """Puts a step's keys and values into a layer's memory.

    Args:
        fresh: ``[2 * kv_heads, tokens, head_dim]``, the keys first.
    """
    if step.begun is not None:
        kv.index_fill_(2, step.begun, 0.0)
    kv.flatten(0, 1).index_copy_(1, step.slots, fresh)


def look(
    query: torch.Tensor,
    kv: torch.Tensor,
    step: Step,
    scaling: float | None,
    window: int | None,
    softcap: float | None = None,
) -> torch.Tensor:
    """What a step's tokens see in a layer's memory.

    Args:
        query: ``[heads, tokens, head_dim]``.

    Returns:
        ``[tokens, heads, head_dim]``, of the type that it was computed in.
    """
    query = query.to(_computed(kv.dtype, kv.device.type))
    if step.grid is not None:
        return _alike(step.grid, query, kv, scaling, window, softcap)
    if len(step.rows) == 1 and not step.batches:
        return _one(step.rows[0], query[None], kv, scaling, window, softcap)[0].transpose(0, 1)
    by_token = query.transpose(0, 1)
    out = torch.empty_like(by_token, memory_format=torch.contiguous_format)
    for batch in step.batches:
        keys, values = batch.seen(kv[0], window).to(query.dtype), batch.seen(kv[1], window).to(query.dtype)
        queries = by_token.index_select(0, batch.tokens)[:, :, None]
        attended = _few(queries, keys, values, batch.mask(window), scaling, softcap)
        out.index_copy_(0, batch.tokens, attended[:, :, 0])
    for row in step.rows:
        span = slice(row.begin, row.begin + row.count)
        out[span] = _one(row, query[None, :, span], kv, scaling, window, softcap)[0].transpose(0, 1)
    return out


def _computed(kept: torch.dtype, device: str) -> torch.dtype:
    """What keys and values that are kept in a type are multiplied in: a CPU may have no products of bfloat16."""
    return quick_dtype(device) if kept == torch.bfloat16 else kept


def _alike(
    grid: Grid, query: torch.Tensor, kv: torch.Tensor, scaling: float | None, window: int | None, softcap: float | None
) -> torch.Tensor:
    """Sequences with as many tokens each; as :func:`look`."""
    heads, _, head_dim = query.shape
    keys, values = grid.seen(kv)
    queries = query.view(heads, *grid.positions.shape, head_dim).transpose(0, 1)
    mask = grid.mask(window, heads // kv.shape[1], kv.dtype)
    return _few(queries, keys, values, mask, scaling, softcap).transpose(1, 2).reshape(-1, heads, head_dim)


def _one(
    row: Row,
    query: torch.Tensor,
    kv: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One sequence: ``[1, heads, count, head_dim]``, both ways."""
    keys, values = row.seen(kv[0], window).to(query.dtype), row.seen(kv[1], window).to(query.dtype)
    if row.count == 1:
        return _few(query, keys, values, None, scaling, softcap)
    heads, kv_heads = query.shape[1], keys.shape[1]
    if row.count <= _FEW or softcap is not None:
        mask = row.mask(window, keys.device, repeated=heads // kv_heads)
        return _few(query, keys, values, mask, scaling, softcap)
    if query.dtype == torch.bfloat16 and query.device.type == "cpu":
        return _many(row, query, keys, values, scaling, window)
    causal = row.past == 0 and (window is None or row.count <= window)
    # The members of all groups as one sequence each, over the same keys. With a mask and enable_gqa, torch has only its
    # plain products for a GPU, which write out all scores.
    group = heads // kv_heads
    attended = scaled_dot_product_attention(
        query.view(kv_heads, group, row.count, -1).transpose(0, 1),
        keys.expand(group, -1, -1, -1),
        values.expand(group, -1, -1, -1),
        attn_mask=None if causal else row.mask(window, keys.device),
        is_causal=causal,
        scale=scaling,
    )
    return attended.transpose(0, 1).reshape(query.shape)


def _many(
    row: Row,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """A piece of a prompt in bfloat16 on a CPU: two products of oneDNN, each half as long as torch's flash attention.

    That computes in float32 there: 7.7 ms instead of 4.3 for 256 tokens behind 768 of SmolLM2-135M, on one core.
    """
    heads, count, head_dim = query.shape[1:]
    kv_heads, seen = keys.shape[1:3]
    grouped = query.reshape(kv_heads, -1, head_dim)
    scores = torch.baddbmm(
        grouped.new_empty(1), grouped, keys[0].mT, beta=0, alpha=head_dim**-0.5 if scaling is None else scaling
    )
    hidden = row.hidden(window, query.device)
    scores.view(heads, count, seen)[:, :, seen - hidden.shape[1] :].add_(hidden)
    return (scores.softmax(-1) @ values[0]).view(query.shape)


def _few(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """``[sequences, heads, count, head_dim]``, the heads of a group as queries of their one head of keys.

    Args:
        mask: to be broadcast over ``[sequences, kv_heads, group * count, seen]``, bool or what is added to the scores;
            None where all is seen.
    """
    grouped = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[3])
    if softcap is None:
        attended = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
    else:  # by its definition: scaled_dot_product_attention has no cap
        scores = grouped @ keys.mT * (query.shape[3] ** -0.5 if scaling is None else scaling)
        scores = (scores / softcap).tanh() * softcap
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        attended = scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values
    return attended.reshape(query.shape)


# Without a mask of the same name transformers makes none: rows say what is seen.
AttentionInterface.register(NAME, attend)
