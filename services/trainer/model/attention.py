"""Attention for training on a CPU, forward and backward several times as fast as torch's kernel.

torch's kernel reaches a fraction of the rate of matrix products there, repeats the keys of grouped heads, and computes
what a mask hides. Here the heads of a group become rows of one product, and a block of queries meets only the keys from
the beginning of its documents to its own end. The backward pass computes the scores of a block again instead of keeping
them, as FlashAttention does (https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from services.trainer.model.kept import Arena

NAME = "codegraft_documents"
BLOCK = 128
"""Queries of a block: fewer save products with keys that are masked, more make larger products."""


def use(model: PreTrainedModel, arena: Arena | None) -> None:
    """Gives a model on a CPU this attention where torch's is what it has.

    Args:
        arena: where its output lies until the backward pass; None leaves it to torch.
    """
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
        for module in model.modules():
            if hasattr(module, "is_causal"):
                cast(Any, module).arena = arena


@dataclass(frozen=True, slots=True)
class Block:
    """Queries ``begin`` to ``end`` and the keys that any of them sees, ``start`` to ``end``."""

    begin: int
    end: int
    start: int
    hidden: torch.Tensor
    """[batch or 1, 1, queries, last keys]: -inf where a query does not see one of them, else 0."""


@dataclass(frozen=True, slots=True)
class Visible:
    """Which keys each query sees: all from a first one to its own. So it is with packed documents and with windows."""

    first: torch.Tensor
    """[batch, tokens]"""
    blocks: list[Block]

    @classmethod
    def of(cls, first: torch.Tensor, dtype: torch.dtype) -> Visible:
        """From the first keys; ``dtype`` is the scores'."""
        blocks = []
        for begin, end in _ranges(first.shape[1]):
            rows = first[:, begin:end]
            # Whole blocks of keys: oneDNN compiles a kernel for every new shape.
            start = int(rows.min()) // BLOCK * BLOCK
            if int(rows.max()) > start:
                mask = _mask(rows, begin, end)[..., start:]
            else:
                mask = _mask(torch.zeros_like(rows[:1]), begin, end)[..., begin:]
            hidden = torch.zeros(mask.shape, dtype=dtype, device=first.device).masked_fill_(~mask, -math.inf)
            blocks.append(Block(begin, end, start, hidden))
        return cls(first, blocks)

    def mask(self) -> torch.Tensor:
        """[batch, 1, queries, keys], True where a query sees a key."""
        return _mask(self.first, 0, self.first.shape[1])


def visible(
    *, batch_size: int, q_length: int, kv_length: int, device: torch.device, dtype: torch.dtype, **others: Any
) -> Visible | torch.Tensor:
    """What :func:`attend` takes as its mask; made once for all layers.

    Returns:
        A mask that hides more than what is before a first key and after the query is as transformers makes it:
        ``[batch, 1, tokens, keys]``.
    """
    options = {**others, "allow_is_causal_skip": False, "device": device, "kv_length": kv_length}
    if q_length == kv_length:
        firsts = []
        for begin, end in _ranges(q_length):
            mask: Any = sdpa_mask(batch_size, end - begin, **{**options, "q_offset": begin})
            firsts.append(mask[:, 0].to(torch.uint8).argmax(-1))
            if not torch.equal(mask, _mask(firsts[-1], begin, kv_length)):
                break
        else:
            return Visible.of(torch.cat(firsts, 1), dtype)
    return cast(torch.Tensor, sdpa_mask(batch_size, q_length, **options))


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Visible | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention; with dropout or anything unusual it is torch's.

    Args:
        query: ``[batch, heads, tokens, head_dim]``; key and value have kv_heads instead of heads.
        attention_mask: what :func:`visible` made.

    Returns:
        ``[batch, tokens, heads, head_dim]``, and no weights.
    """
    unusual = any(others.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    if not isinstance(attention_mask, Visible) or unusual or dropout or value.shape[3] != query.shape[3]:
        mask = attention_mask.mask() if isinstance(attention_mask, Visible) else attention_mask
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **others
        )
        return found
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    arena = getattr(module, "arena", None) if torch.is_grad_enabled() else None
    return _Attend.apply(query, key, value, attention_mask.blocks, scale, arena), None  # type: ignore[no-untyped-call]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, visible)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        blocks: list[Block],
        scale: float,
        arena: Arena | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scale = blocks, scale
        keys, values = _stacked(key).transpose(1, 2).contiguous(), _stacked(value)
        batch, heads, tokens, width = query.shape
        shape = (batch, tokens, heads, width)
        out = query.new_empty(shape) if arena is None else arena.empty(shape, query.dtype)
        for block in blocks:
            part = slice(block.begin, block.end)
            shares = _shares(_rows(query[:, :, part] * scale, len(keys)), keys, block, batch)
            _put(torch.bmm(shares, values[:, block.start : block.end]), out[:, part].transpose(1, 2))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value = ctx.saved_tensors
        to_out = gradients[0].transpose(1, 2)
        keys = _stacked(key)
        keys_across, values_across = (_stacked(part).transpose(1, 2).contiguous() for part in (key, value))
        # Every block adds to the gradients of its keys; bfloat16 would lose what comes late.
        wide = torch.promote_types(query.dtype, torch.float32)
        to_keys, to_values = (torch.zeros(keys.shape, dtype=wide, device=keys.device) for _ in range(2))
        to_query = torch.empty_like(query)
        for block in ctx.blocks:
            part, seen = slice(block.begin, block.end), slice(block.start, block.end)
            queries, to_rows = _rows(query[:, :, part] * ctx.scale, len(keys)), _rows(to_out[:, :, part], len(keys))
            shares = _shares(queries, keys_across, block, len(query))
            to_values[:, seen] += torch.bmm(shares.transpose(1, 2), to_rows)
            to_shares = torch.bmm(to_rows, values_across[:, :, seen])
            to_scores = torch._softmax_backward_data(to_shares, shares, -1, shares.dtype)
            to_keys[:, seen] += torch.bmm(to_scores.transpose(1, 2), queries)
            _put(torch.bmm(to_scores, keys[:, seen]).mul_(ctx.scale), to_query[:, :, part])
        to_key, to_value = to_keys.view(key.shape).to(key.dtype), to_values.view(value.shape).to(value.dtype)
        return to_query, to_key, to_value, None, None, None


def _shares(queries: torch.Tensor, keys: torch.Tensor, block: Block, batch: int) -> torch.Tensor:
    """What each key's value counts for, [batch * kv_heads, heads of a group * queries, keys].

    Args:
        queries: [batch * kv_heads, heads of a group * queries, head_dim], scaled.
        keys: [batch * kv_heads, head_dim, all keys].
    """
    scores = torch.bmm(queries, keys[:, :, block.start : block.end])
    each = scores.view(batch, -1, block.end - block.begin, block.end - block.start)
    each[..., -block.hidden.shape[-1] :] += block.hidden
    return scores.softmax(-1)


def _ranges(tokens: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + BLOCK, tokens)) for begin in range(0, tokens, BLOCK))


def _mask(first: torch.Tensor, begin: int, keys: int) -> torch.Tensor:
    """[batch, 1, queries, keys], True where a query sees a key; the queries are those from ``begin`` on."""
    rows = torch.arange(begin, begin + first.shape[1], device=first.device)[:, None]
    columns = torch.arange(keys, device=first.device)
    return ((columns >= first[:, :, None]) & (columns <= rows))[:, None]


def _stacked(heads: torch.Tensor) -> torch.Tensor:
    """[batch, kv_heads, tokens, head_dim] as [batch * kv_heads, tokens, head_dim]."""
    return heads.reshape(-1, *heads.shape[2:])


def _rows(heads: torch.Tensor, groups: int) -> torch.Tensor:
    """[batch, heads, tokens, head_dim] as [batch * kv_heads, heads of a group * tokens, head_dim]."""
    return heads.reshape(groups, -1, heads.shape[3])


def _put(rows: torch.Tensor, heads: torch.Tensor) -> None:
    """The other way round."""
    heads.copy_(rows.view(heads.shape))
