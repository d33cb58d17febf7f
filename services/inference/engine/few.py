"""A step over a few tokens on a CPU as the compiled kernels take it, see engine/kernels.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from services.inference.engine.attention import Step
from services.inference.engine.rows import Row

MOST = 32
"""Tokens up to which one thread that calls no torch is faster than torch with all of them."""
_EACH = 8
"""Tokens of one sequence up to which the kernel attends, which reads its keys for each anew. Without products of
bfloat16 and after 500 tokens, two threads take for 1, 4, 8 and 16 tokens of one sequence 52, 133, 250 and 458
microseconds, torch 307, 363, 468 and 609; one thread for 8 312, torch 301. For 16 sequences of one token it is 686 and
2,833."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """The same memory for torch and for the kernels. To make the array of a tensor takes as long as a small kernel."""

    tensor: torch.Tensor
    """``[tokens, width]``, float32, without gaps."""
    array: Any

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Sheet:
        """Of a tensor that lies so."""
        return cls(tensor, tensor.numpy())


@dataclass(frozen=True, slots=True)
class Heads:
    """Queries, keys and values of a few tokens, and what they see; the same memory as theirs."""

    turned: Any
    """``[tokens, heads, 2, head_dim / 2]``, as all arrays float32."""
    all: Any
    """``[tokens, heads, head_dim]``"""
    queries: torch.Tensor
    """``[query_heads, tokens, head_dim]``"""
    seen: torch.Tensor
    """``[tokens, query_heads * head_dim]``"""
    out: Any
    """``[tokens, query_heads, head_dim]``"""

    @classmethod
    def of(cls, qkv: torch.Tensor, seen: torch.Tensor, width: int) -> Heads:
        """Of a joint's output and where to put what is seen.

        Args:
            width: of a head.
        """
        tokens = len(qkv)
        heads, out = qkv.view(tokens, -1, width), seen.view(tokens, -1, width)
        halves = heads.view(tokens, -1, 2, width // 2)
        queries = heads[:, : out.shape[1]].transpose(0, 1)
        return cls(halves.numpy(), heads.numpy(), queries, seen, out.numpy())


@dataclass(frozen=True, slots=True)
class Few:
    """Arrays over the same memory as the step's tensors."""

    kv: list[Any]
    """As :attr:`Step.kv`, the bits of bfloat16 as uint16."""
    slots: Any
    begun: Any
    """As the step's, int64."""
    tables: Any = None
    """Blocks of each token's sequence, ``[tokens, blocks]``, int64; None where torch attends."""
    pasts: Any = None
    """Tokens before each, ``[tokens]``, int64."""


def bits(kv: list[torch.Tensor]) -> list[Any] | None:
    """The memory of all layers as arrays; None where it is not bfloat16 of a CPU."""
    if any(layer.dtype != torch.bfloat16 or layer.device.type != "cpu" for layer in kv):
        return None
    return [layer.view(torch.uint16).numpy() for layer in kv]


def few(step: Step, kv: list[Any], rows: Sequence[Row]) -> Few:
    """The step's arrays.

    Args:
        kv: from :func:`bits`.
        rows: all sequences of the step.
    """
    begun = np.empty(0, np.int64) if step.begun is None else step.begun.numpy()
    slots, tokens = step.slots.numpy(), sum(row.count for row in rows)
    if any(row.count > _EACH for row in rows):
        return Few(kv, slots, begun)
    tables = np.zeros((tokens, max(len(row.blocks) for row in rows)), np.int64)
    pasts = np.zeros(tokens, np.int64)
    for row in rows:
        tables[row.begin : row.begin + row.count, : len(row.blocks)] = row.blocks
        pasts[row.begin : row.begin + row.count] = range(row.past, row.past + row.count)
    return Few(kv, slots, begun, tables, pasts)
