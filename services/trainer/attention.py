"""Attention for training on a CPU, forward and backward several times as fast as torch's kernel.

torch's kernel reaches a fraction of the rate of matrix products there, repeats the keys of grouped heads, and computes
what a mask hides. Here the heads of a group become rows of one product, and a block of queries meets only the keys from
the beginning of its documents to its own end. The backward pass computes the scores of a block again instead of keeping
them, as FlashAttention does (https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "codegraft_documents"
BLOCK = 128
"""Queries of a block: fewer save products with keys that are masked, more make larger products."""


def use(model: PreTrainedModel) -> None:
    """Gives a model on a CPU this attention where torch's is what it has."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention; with dropout or anything unusual it is torch's.

    Args:
        query: ``[batch, heads, tokens, head_dim]``; key and value have kv_heads instead of heads.
        attention_mask: what :func:`first_keys` made.

    Returns:
        ``[batch, tokens, heads, head_dim]``, and no weights.
    """
    first = attention_mask if attention_mask is not None and attention_mask.dtype == torch.int64 else None
    unusual = any(others.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    if first is None or unusual or dropout or value.shape[3] != query.shape[3]:
        mask = attention_mask if first is None else _mask(first)
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **others
        )
        return found
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return _Attend.apply(query, key, value, first, scale), None  # type: ignore[no-untyped-call]


def first_keys(*, batch_size: int, q_length: int, kv_length: int, device: torch.device, **others: Any) -> torch.Tensor:
    """For each query the first key it sees, ``[batch, tokens]``: it sees all from there to its own.

    That covers documents packed in a row and sliding windows. Any other mask is returned as transformers makes it,
    ``[batch, 1, tokens, keys]``.
    """
    options = {**others, "allow_is_causal_skip": False, "device": device, "kv_length": kv_length}
    if q_length == kv_length:
        firsts = []
        for begin, end in _blocks(q_length):
            mask = sdpa_mask(batch_size, end - begin, **{**options, "q_offset": begin})
            firsts.append(mask[:, 0].to(torch.uint8).argmax(-1))
            if not torch.equal(mask, _mask(firsts[-1], begin, kv_length)):
                break
        else:
            return torch.cat(firsts, 1)
    whole: torch.Tensor = sdpa_mask(batch_size, q_length, **options)
    return whole


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, first_keys)


def _mask(first: torch.Tensor, begin: int = 0, keys: int | None = None) -> torch.Tensor:
    """``[batch, 1, queries, keys]``, True where a query sees a key; the queries are those from ``begin`` on."""
    rows = torch.arange(begin, begin + first.shape[1], device=first.device)[:, None]
    columns = torch.arange(keys or first.shape[1], device=first.device)
    return ((columns >= first[:, :, None]) & (columns <= rows))[:, None]


def _blocks(tokens: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + BLOCK, tokens)) for begin in range(0, tokens, BLOCK))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, first: torch.Tensor, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, first)
        ctx.scale = scale
        sides = _Sides(query, key, value, first, scale)
        values = _stacked(value)
        out = query.new_empty(len(query), query.shape[2], query.shape[1], query.shape[3])
        for begin, end, start in sides.blocks():
            shares = sides.shares(sides.queries(begin, end), begin, end, start)
            _put(torch.bmm(shares, values[:, start:end]), out[:, begin:end].transpose(1, 2))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, first = ctx.saved_tensors
        outer = gradients[0].transpose(1, 2)
        sides = _Sides(query, key, value, first, ctx.scale)
        keys, values = _stacked(key), _stacked(value).transpose(1, 2).contiguous()
        # Every block adds to the gradients of its keys; bfloat16 would lose what comes late.
        wide = torch.promote_types(query.dtype, torch.float32)
        to_keys = torch.zeros(keys.shape, dtype=wide, device=keys.device)
        to_values = torch.zeros_like(to_keys)
        to_query = torch.empty_like(query)
        for begin, end, start in sides.blocks():
            queries = sides.queries(begin, end)
            above = _rows(outer[:, :, begin:end], len(keys))
            shares = sides.shares(queries, begin, end, start)
            to_values[:, start:end] += torch.bmm(shares.transpose(1, 2), above)
            to_shares = torch.bmm(above, values[:, :, start:end])
            to_scores = torch._softmax_backward_data(to_shares, shares, -1, shares.dtype)
            to_keys[:, start:end] += torch.bmm(to_scores.transpose(1, 2), queries)
            _put(torch.bmm(to_scores, keys[:, start:end]).mul_(ctx.scale), to_query[:, :, begin:end])
        return to_query, to_keys.view(key.shape).to(key.dtype), to_values.view(value.shape).to(value.dtype), None, None


class _Sides:
    """Queries and keys of a layer, in blocks: [batch * kv_heads, rows, head_dim], a group's heads one after the other."""

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, first: torch.Tensor, scale: float
    ) -> None:
        self._query, self._first, self._scale = query, first, scale
        self._keys = _stacked(key).transpose(1, 2).contiguous()
        self._lowest = [int(part) for part in torch.stack([p.amin() for p in first.split(BLOCK, 1)])]
        self._highest = [int(part) for part in torch.stack([p.amax() for p in first.split(BLOCK, 1)])]
        self._later = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=query.device).triu_(1)

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """Begin and end of each block of queries, and the first key of any of them."""
        for (begin, end), lowest in zip(_blocks(self._query.shape[2]), self._lowest, strict=True):
            # Whole blocks of keys: oneDNN compiles a kernel for every new shape.
            yield begin, end, lowest // BLOCK * BLOCK

    def queries(self, begin: int, end: int) -> torch.Tensor:
        return _rows(self._query[:, :, begin:end] * self._scale, len(self._keys))

    def shares(self, queries: torch.Tensor, begin: int, end: int, start: int) -> torch.Tensor:
        """What each key's value counts for: [batch * kv_heads, rows, keys from start to end]."""
        scores = torch.bmm(queries, self._keys[:, :, start:end])
        each = scores.view(len(self._first), -1, end - begin, end - start)
        each[..., begin - start :].masked_fill_(self._later[: end - begin, : end - begin], -math.inf)
        if self._highest[begin // BLOCK] > start:
            columns = torch.arange(start, end, device=scores.device)
            each.masked_fill_(columns < self._first[:, None, begin:end, None], -math.inf)
        return scores.softmax(-1)


def _stacked(heads: torch.Tensor) -> torch.Tensor:
    """[batch, kv_heads, tokens, head_dim] as [batch * kv_heads, tokens, head_dim]."""
    return heads.reshape(-1, *heads.shape[2:])


def _rows(heads: torch.Tensor, groups: int) -> torch.Tensor:
    """[batch, heads, tokens, head_dim] as [batch * kv_heads, heads of a group * tokens, head_dim]."""
    return heads.reshape(groups, -1, heads.shape[3])


def _put(rows: torch.Tensor, heads: torch.Tensor) -> None:
    """The other way round."""
    heads.copy_(rows.view(heads.shape))
