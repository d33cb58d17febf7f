"""LoRA layers that take a different adapter for every part of a step.

A wrapped linear layer computes ``W x + B A x`` where A and B belong to the sequence that the token is of
(arXiv:2106.09685). Weights are immutable objects handed in with each step, so switching a version costs nothing and a
running sequence keeps its own. No PEFT at serving time; its files are read as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """One adapter version, ready to run."""

    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    """By module path: A ``[rank, in]`` and B ``[out, rank]`` with the scale in it."""
    rank: int
    size: int
    """Bytes."""
    digest: str
    """Names what is computed with them: two of the same digest give the same keys and values."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [begin, end) of a step, and the adapter they run on."""

    begin: int
    end: int
    weights: Weights


class Active(threading.local):
    """The segments of the step in progress, shared by all layers of a model.

    Every thread has its own, so that an adapter is probed beside the engine's steps.
    """

    def __init__(self) -> None:
        self.segments: list[Segment] = []

    @contextmanager
    def use(self, segments: list[Segment]) -> Iterator[None]:
        """Sets the segments for one forward pass; tokens in none of them run on the base model."""
        self.segments = segments
        try:
            yield
        finally:
            self.segments = []


class LoraLinear(nn.Module):
    """A linear layer with the step's adapters on top; without segments it costs one test."""

    def __init__(self, base: nn.Linear, path: str, active: Active) -> None:
        super().__init__()
        self.base, self.path, self.active = base, path, active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[1, tokens, in]`` to ``[1, tokens, out]``."""
        y: torch.Tensor = self.base(x)
        for segment in self.active.segments:
            if (pair := segment.weights.layers.get(self.path)) is not None:
                a, b = pair
                span = slice(segment.begin, segment.end)
                y[0, span] += (x[0, span].to(a.dtype) @ a.T) @ b.T
        return y


def install(model: PreTrainedModel) -> Active:
    """Wraps every linear layer but the output head; gives what sets the adapters of a step."""
    active = Active()
    for path in adaptable(model):
        parent, _, name = path.rpartition(".")
        base = model.get_submodule(path)
        assert isinstance(base, nn.Linear)
        setattr(model.get_submodule(parent), name, LoraLinear(base, path, active))
    return active


def adaptable(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer that an adapter may change, by module path.

    The output head is not among them: it is tied to the embeddings in most of the catalogue.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            found[path] = (module.base.out_features, module.base.in_features)
        elif isinstance(module, nn.Linear) and module is not head and not path.endswith(".base"):
            found[path] = (module.out_features, module.in_features)
    return found


def prepare(
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
    sha256: str,
) -> Weights:
    """Verified A and B matrices, ready to run: the scale goes into B before it is rounded.

    On a CPU they stay float32: its products of few tokens with few ranks take 2 microseconds, in bfloat16 17.

    Args:
        sha256: of the file that they are from.
    """
    if device.type == "cpu":
        dtype = torch.float32
    layers = {
        path: (a.to(device, dtype).contiguous(), (b.float() * scale).to(device, dtype).contiguous())
        for path, (a, b) in pairs.items()
    }
    size = sum(t.numel() * t.element_size() for pair in layers.values() for t in pair)
    return Weights(
        layers=layers,
        rank=max((a.shape[0] for a, _ in layers.values()), default=0),
        size=size,
        digest=f"{sha256} x {scale!r}",  # the scale is not in the file
    )
