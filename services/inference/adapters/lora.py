"""LoRA layers that take a different adapter for every part of a step.

A linear layer computes ``W x + B A x`` where A and B belong to the sequence that the token is of
(arXiv:2106.09685). Weights are immutable objects handed in with each step, so switching a version costs nothing and a
running sequence keeps its own. No PEFT at serving time; its files are read as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from services.inference.adapters.indexed import Memory
from services.inference.adapters.mix import Mix, Mixer
from services.inference.adapters.stack import Paths, Shape
from services.inference.engine.weights import Plain, Product

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers with the same input, where an architecture has them apart: they are one product."""


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """One adapter version, ready to run."""

    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    """By module path: A ``[rank, in]`` and B ``[out, rank]``. On a CPU as they were read: steps compute with a stack's
    copy. On a GPU they lie in memory transposed, which their products with few tokens want."""
    joints: Mapping[Paths, torch.Tensor]
    """On a GPU, of layers with the same input: their A side by side, ``[in, sum of ranks]``; those of ``layers`` lie in
    it."""
    rank: int
    size: int
    """Bytes."""
    digest: str
    """Names what is computed with them: two of the same digest give the same keys and values."""
    dtype: torch.dtype
    """That a stack rounds them to."""
    scale: float = 1.0
    """What the products with B are still to be multiplied with."""

    @property
    def on_cpu(self) -> bool:
        """Whether they lie in the memory of the CPU."""
        return all(a.device.type == "cpu" for a, _ in self.layers.values())


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [begin, end) of a step, and the adapter they run on."""

    begin: int
    end: int
    weights: Weights


class Active(threading.local):
    """The adapters of the step in progress, shared by all layers of a model.

    Every thread has its own mix, so that an adapter may be tried beside the engine's steps.
    """

    def __init__(self, mixer: Mixer) -> None:
        self.mix: Mix | None = None
        self._mixer = mixer

    def stage(self, weights: Weights) -> None:
        """See :meth:`services.inference.adapters.mix.Mixer.stage`."""
        self._mixer.stage(weights)

    def order(self, weights: Weights | None) -> tuple[int, int, int]:
        """See :meth:`services.inference.adapters.mix.Mixer.order`."""
        return self._mixer.order(weights)

    def index(self, segments: list[Segment]) -> list[tuple[Memory, list[int]]]:
        """See :meth:`services.inference.adapters.mix.Mixer.index`."""
        return self._mixer.index(segments)

    @contextmanager
    def use(self, segments: list[Segment]) -> Iterator[None]:
        """Sets the segments for one forward pass of a step; tokens in none of them run on the base model."""
        with self.mixed(self._mixer.mix(segments) if segments else None):
            yield

    @contextmanager
    def beside(self, segment: Segment) -> Iterator[None]:
        """Sets one for a forward pass while the engine's steps go on, in any other thread."""
        with self._mixer.beside(segment) as mix, self.mixed(mix):
            yield

    @contextmanager
    def mixed(self, mix: Mix | None) -> Iterator[None]:
        """The same with a mix that was made before; None for the base model."""
        self.mix = mix
        try:
            yield
        finally:
            self.mix = None


class Joint:
    """Linear layers with the same input: one product, and the step's adapters on top.

    Without adapters these cost one test.
    """

    def __init__(self, paths: Paths, layers: list[nn.Linear], active: Active) -> None:
        self.paths, self._active = paths, active
        self.outs = tuple(layer.out_features for layer in layers)
        weights = [layer.weight.detach() for layer in layers]
        self.weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.bias: torch.Tensor | None = None
        if any(layer.bias is not None for layer in layers):
            self.bias = torch.cat(
                [
                    layer.weight.new_zeros(out) if layer.bias is None else layer.bias.detach()
                    for layer, out in zip(layers, self.outs, strict=True)
                ]
            )
        self.product: Product = Plain(self.weight, self.bias)
        self.last: tuple[torch.Tensor, Sequence[torch.Tensor]] | None = None

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """``[tokens, in]`` to ``[tokens, sum of outs]``."""
        y = self.product(x)
        if (mix := self._active.mix) is not None:
            mix.add(self.paths, x, y, self.outs)
        return y


class Layer(nn.Module):
    """Takes the place of a linear layer.

    The first of a joint to be called computes for all, the last one forgets it. Who comes with another input than the
    one before (another thread may have been in between) computes again.
    """

    def __init__(self, joint: Joint, index: int, width: int) -> None:
        super().__init__()
        self.joint, self._index = joint, index
        self.in_features, self.out_features = width, joint.outs[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[1, tokens, in]`` to ``[1, tokens, out]``."""
        joint = self.joint
        if len(joint.outs) == 1:
            return joint.compute(x[0])[None]
        last = joint.last
        if last is None or last[0] is not x:
            last = (x, torch.split_with_sizes(joint.compute(x[0])[None], joint.outs, -1))
        joint.last = last if self._index + 1 < len(joint.outs) else None
        return last[1][self._index]


def install(model: PreTrainedModel) -> Active:
    """Makes every linear layer but the output head take adapters, those with the same input as one product.

    Gives what sets the adapters of a step.
    """
    groups: dict[Paths, Shape] = {}
    active = Active(Mixer(groups))
    for paths in siblings(adaptable(model)):
        linear = [layer for path in paths if isinstance(layer := model.get_submodule(path), nn.Linear)]
        joint, width = Joint(paths, linear, active), linear[0].in_features
        groups[paths] = Shape(width, joint.outs)
        for index, path in enumerate(paths):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Layer(joint, index, width))
    return active


def joints(model: PreTrainedModel) -> list[Joint]:
    """The products of a model that :func:`install` has been through."""
    return list(dict.fromkeys(module.joint for module in model.modules() if isinstance(module, Layer)))


def siblings(paths: Iterable[str]) -> list[Paths]:
    """Groups module paths by input: what stands side by side in one of the usual ways, and the rest one by one."""
    ordered, groups = dict.fromkeys(paths), dict[Paths, None]()
    for path in ordered:
        parent, dot, name = path.rpartition(".")
        names = next((names for names in _SIBLINGS if name in names), (name,))
        members = tuple(f"{parent}{dot}{member}" for member in names)
        groups[members if all(member in ordered for member in members) else (path,)] = None
    return list(groups)


def adaptable(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer that an adapter may change, by module path.

    The output head is not among them: it is tied to the embeddings in most of the catalogue.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Layer) and module is not head
    }


def prepare(
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
    sha256: str,
) -> Weights:
    """Verified A and B matrices, ready to run: the scale goes into B before it is rounded.

    Args:
        dtype: that they are rounded to, the model's.
        sha256: of the file that they are from.
    """
    made = Weights(
        layers=pairs,
        joints={},
        rank=max((a.shape[0] for a, _ in pairs.values()), default=0),
        size=sum(t.numel() * dtype.itemsize for pair in pairs.values() for t in pair),
        digest=f"{sha256} x {scale!r}",  # the scale is not in the file
        dtype=dtype,
        scale=scale,
    )
    if device.type == "cpu":
        return made
    layers, joints = dict[str, tuple[torch.Tensor, torch.Tensor]](), dict[Paths, torch.Tensor]()
    for paths in siblings(pairs):
        ranks = [pairs[path][0].shape[0] for path in paths]
        joints[paths] = torch.cat([pairs[path][0].to(device, dtype).T for path in paths], 1)
        for path, a in zip(paths, torch.split_with_sizes(joints[paths], ranks, 1), strict=True):
            layers[path] = a.T, (pairs[path][1].float() * scale).to(device, dtype).T.contiguous().T
    return replace(made, layers=layers, joints=joints, scale=1.0)
