"""What training keeps in memory between a layer's forward and its backward pass."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

TRIM_LAYERS = 10
"""So many layers are computed before the allocator gives back what they freed."""


def keep_inputs_only(model: nn.Module) -> None:
    """Low memory mode: of every layer only its input is kept, and the layer is computed again in the backward pass."""
    for layer in _layers(model):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


def give_back(model: nn.Module, device: torch.device) -> None:
    """Makes glibc give the holes between kept tensors back to the system, every few layers of a forward pass.

    A layer frees more than it keeps, and what is kept lies between: with SmolLM2 and 1,024 tokens the holes are 200 MB
    beside 430 MB that are kept. Giving them back costs about 2 % of a step's time.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if device.type == "cpu" else None
    if trim is None:  # another C library
        return

    def after(module: nn.Module, *_: Any) -> None:
        if module.training:
            trim(0)

    for layer in _layers(model)[TRIM_LAYERS - 1 :: TRIM_LAYERS]:
        layer.register_forward_hook(after)


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
