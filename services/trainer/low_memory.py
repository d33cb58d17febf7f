"""Low memory mode: of every layer only its input is kept, and the layer is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def use(model: nn.Module) -> None:
    """Puts the model's layers into low memory mode; it holds while they train."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = _Again()


class _Again:
    """Runs one layer.

    Its input is copied to a place that is the layer's own for good. Left where it was made, between what the layer
    before used and freed again, it would keep the allocator from using that memory as a whole: 140 MB with 30 layers.
    """

    def __init__(self) -> None:
        self._place = torch.empty(0)

    def __call__(self, run: Callable[..., Any], hidden: torch.Tensor, *others: Any) -> Any:
        if self._place.shape != hidden.shape or self._place.dtype != hidden.dtype:
            self._place = torch.empty_like(hidden, requires_grad=False)
        # The layer computes gradients of its adapters only when its input wants one.
        wanted = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
        return checkpoint(run, _Kept.apply(wanted, self._place), *others, use_reentrant=True)  # type: ignore[no-untyped-call]


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        return place.copy_(hidden).detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None
