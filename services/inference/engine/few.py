"""A step over a few tokens on a CPU as the compiled kernels take it, see engine/kernels.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from services.inference.engine.attention import Step

MOST = 32
"""Tokens up to which one thread that calls no torch is faster than torch with all of them."""
_ALONE = 3
"""Single tokens up to which a thread that reads their keys and values in place is faster than torch."""


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


def few(step: Step, kv: list[Any]) -> Few:
    """The step's arrays.

    Args:
        kv: from :func:`bits`.
    """
    begun = np.empty(0, np.int64) if step.begun is None else step.begun.numpy()
    slots, rows = step.slots.numpy(), step.rows
    if step.batches or len(rows) > _ALONE or any(row.count > 1 for row in rows):
        return Few(kv, slots, begun)
    tables = np.zeros((len(rows), max(len(row.blocks) for row in rows)), np.int64)
    pasts = np.zeros(len(rows), np.int64)
    for row in rows:
        tables[row.begin, : len(row.blocks)] = row.blocks
        pasts[row.begin] = row.past
    return Few(kv, slots, begun, tables, pasts)
