"""A decoder's layers as training needs them: the same numbers as transformers' and PEFT's, less time, less kept.

The base is frozen. So no layer computes a gradient of its weights, nor keeps an input for one; what the backward pass
needs and can have from a product of a few elements (norms, activations) it computes again (as Unsloth and Liger-Kernel
do). Weights stay where they are: only the forward methods of modules change, and only of modules whose class is known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from services.trainer.model.kept import Arena


def speed_up(model: nn.Module, arena: Arena | None) -> None:
    """Replaces the forward methods of the layers that are known; the others stay as they are.

    Args:
        model: with PEFT's adapter on it.
        arena: where what is kept for the backward pass lies; None leaves it to torch.
    """
    for module in model.modules():
        forward = _faster(module, arena)
        if forward is not None:
            cast(Any, module).forward = forward


def _faster(module: Any, arena: Arena | None) -> Callable[[torch.Tensor], torch.Tensor] | None:
    if isinstance(module, LoraLinear) and _is_linear(module):
        return functools.partial(_lora_forward, module)
    if _is_rms_norm(module):
        return functools.partial(_norm_forward, module)
    if _is_gated_mlp(module):
        return functools.partial(_mlp_forward, module, module.forward, arena)
    return None


def _is_rms_norm(module: Any) -> bool:
    """Of the kind that scales by its weight after rounding; Gemma's, which adds one to it, has no variance_epsilon."""
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _is_gated_mlp(module: Any) -> bool:
    names = {name for name, _ in module.named_children()}
    return (
        type(module).__name__.endswith("MLP")
        and names == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and isinstance(module.act_fn, (nn.SiLU, type(ACT2FN["silu"])))
        and all(_is_linear(getattr(module, name)) for name in ("gate_proj", "up_proj", "down_proj"))
    )


def _is_linear(module: Any) -> bool:
    return isinstance(module.get_base_layer() if isinstance(module, LoraLinear) else module, nn.Linear)


class Projection(NamedTuple):
    """A linear layer and its adapter: ``y = x W' + b + scale (x A') B'``."""

    weight: torch.Tensor
    """[out, in], frozen."""
    bias: torch.Tensor | None
    """[out], frozen."""
    a: torch.Tensor | None
    """[rank, in]; None where the layer is not adapted."""
    b: torch.Tensor | None
    """[out, rank]."""
    scale: float

    @classmethod
    def of(cls, module: Any) -> Projection:
        """Of an nn.Linear, with or without PEFT's adapter on it."""
        if not isinstance(module, LoraLinear):
            return cls(module.weight, module.bias, None, None, 1.0)
        base = cast(Any, module.get_base_layer())
        name = module.active_adapter[0] if isinstance(module.active_adapter, list) else module.active_adapter
        a, b = (cast(Any, part[name]).weight for part in (module.lora_A, module.lora_B))
        return cls(base.weight, base.bias, a, b, module.scaling[name])

    def forward(
        self, x: torch.Tensor, seen: torch.Tensor | None = None, arena: Arena | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``y`` [tokens, out] and ``x A'`` [tokens, rank], which :meth:`backward` wants.

        Args:
            x: [tokens, in].
            seen: what the adapter sees of it, when that is something else: after dropout.
            arena: where ``y`` shall lie.
        """
        shape = (len(x), len(self.weight))
        y = x.new_empty(shape) if arena is None else arena.empty(shape, x.dtype)
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=y)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=y)
        if self.a is None or self.b is None:
            return y, None
        inner = torch.mm(x if seen is None else seen, self.a.t())
        return y.addmm_(inner, self.b.t(), alpha=self.scale), inner

    def backward(
        self, to_y: torch.Tensor, x: torch.Tensor, inner: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Gradients of ``x A'`` [tokens, rank], A and B; None where the layer is not adapted.

        Args:
            x: what the adapter saw.
        """
        if self.b is None or inner is None:
            return None, None, None
        to_inner = torch.mm(to_y, self.b).mul_(self.scale)
        return to_inner, torch.mm(to_inner.t(), x), torch.mm(to_y.t(), inner).mul_(self.scale)

    def to_input(
        self, to_y: torch.Tensor, to_inner: torch.Tensor | None, onto: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Gradient of ``x`` [tokens, in], added to ``onto`` in place if there is one.

        Args:
            to_inner: as from :meth:`backward`; None to leave the adapter's way out.
        """
        found = torch.mm(to_y, self.weight) if onto is None else onto.addmm_(to_y, self.weight)
        return found if to_inner is None or self.a is None else found.addmm_(to_inner, self.a)


class Normed(NamedTuple):
    """How to make a norm's output again. Its input is kept anyway, so that the layers after it keep no output."""

    x: torch.Tensor
    """[..., width], the norm's input."""
    weight: torch.Tensor
    """[width]"""
    scale: torch.Tensor
    """[..., 1], in fp32 at least."""

    def again(self) -> torch.Tensor:
        """[tokens, width], the same bits."""
        y = (self.x * self.scale).to(self.x.dtype).mul_(self.weight)
        return y.view(-1, y.shape[-1])


def _source(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What to keep of a layer's input, for :func:`_again`."""
    normed: Normed | None = getattr(x, "normed", None)
    return (x.reshape(-1, x.shape[-1]),) if normed is None else tuple(normed)


def _again(source: Sequence[torch.Tensor]) -> torch.Tensor:
    """The input [tokens, width]."""
    return source[0] if len(source) == 1 else Normed(*source).again()


class _Lora(torch.autograd.Function):
    """One linear layer with its adapter."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        seen: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        source: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        y, inner = Projection(weight, bias, a, b, scale).forward(x, seen)
        ctx.save_for_backward(inner, weight, a, b, *(source if seen is None else (seen,)))
        ctx.scale, ctx.has_seen = scale, seen is not None
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        inner, weight, a, b, *source = ctx.saved_tensors
        projection = Projection(weight, None, a, b, ctx.scale)
        (to_y,) = gradients
        to_inner, to_a, to_b = projection.backward(to_y, _again(source), inner)
        to_x = projection.to_input(to_y, None if ctx.has_seen else to_inner) if ctx.needs_input_grad[0] else None
        to_seen = torch.mm(to_inner, a) if ctx.has_seen and to_inner is not None else None
        return to_x, to_seen, None, None, to_a, to_b, None, None


def _lora_forward(module: LoraLinear, x: torch.Tensor) -> torch.Tensor:
    weight, bias, a, b, scale = Projection.of(module)
    flat = x.reshape(-1, x.shape[-1])
    dropout = cast(Any, module.lora_dropout[next(iter(module.lora_A))])
    seen = dropout(flat) if module.training and isinstance(dropout, nn.Dropout) else None
    y: torch.Tensor = _Lora.apply(flat, seen, weight, bias, a, b, scale, _source(x))  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


class _GatedMlp(torch.autograd.Function):
    """``down(silu(gate(x)) * up(x))``; keeps x and the two products, not what the activation makes of them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        source: tuple[torch.Tensor, ...],
        scales: tuple[float, ...],
        arena: Arena | None,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        gate, up, down = _projections(scales, tensors)
        gated, gate_inner = gate.forward(x, arena=arena)
        lifted, up_inner = up.forward(x, arena=arena)
        y, down_inner = down.forward(functional.silu(gated).mul_(lifted))
        ctx.save_for_backward(gated, lifted, gate_inner, up_inner, down_inner, *tensors, *source)
        ctx.scales, ctx.count = scales, len(tensors)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        gated, lifted, gate_inner, up_inner, down_inner, *rest = ctx.saved_tensors
        gate, up, down = _projections(ctx.scales, rest[: ctx.count])
        x = _again(rest[ctx.count :])
        (to_y,) = gradients
        active = functional.silu(gated)
        to_down, *down_grads = down.backward(to_y, active * lifted, down_inner)
        to_product = down.to_input(to_y, to_down)
        to_lifted = active.mul_(to_product)
        to_gated = torch.ops.aten.silu_backward(to_product.mul_(lifted), gated)
        to_gate, *gate_grads = gate.backward(to_gated, x, gate_inner)
        to_up, *up_grads = up.backward(to_lifted, x, up_inner)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = up.to_input(to_lifted, to_up, gate.to_input(to_gated, to_gate))
        return to_x, None, None, None, *(None, None, *gate_grads), *(None, None, *up_grads), *(None, None, *down_grads)


def _projections(scales: tuple[float, ...], tensors: Any) -> list[Projection]:
    fours = [tensors[start : start + 4] for start in range(0, len(tensors), 4)]
    return [Projection(weight, bias, a, b, scale) for (weight, bias, a, b), scale in zip(fours, scales, strict=True)]


def _mlp_forward(
    module: Any, otherwise: Callable[[torch.Tensor], torch.Tensor], arena: Arena | None, x: torch.Tensor
) -> torch.Tensor:
    layers = [module.gate_proj, module.up_proj, module.down_proj]
    if module.training and any(isinstance(part, nn.Dropout) for layer in layers for part in layer.modules()):
        return otherwise(x)
    parts = [Projection.of(layer) for layer in layers]
    tensors = [tensor for part in parts for tensor in part[:4]]
    scales = tuple(part.scale for part in parts)
    flat = x.reshape(-1, x.shape[-1])
    y: torch.Tensor = _GatedMlp.apply(  # type: ignore[no-untyped-call]
        flat, _source(x), scales, arena if torch.is_grad_enabled() else None, *tensors
    )
    return y.view(x.shape)


class _RmsNorm(torch.autograd.Function):
    """The output, and the factor [..., 1] of each token; keeps its input in the precision that it came in."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.mark_non_differentiable(scale)
        return (wide * scale).to(x.dtype).mul_(weight), scale

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, scale = ctx.saved_tensors
        to_normed = (gradients[0] * weight).to(scale.dtype)
        normed = x * scale
        shared = (to_normed * normed).mean(-1, keepdim=True)
        return (to_normed - normed.mul_(shared)).mul_(scale).to(x.dtype), None, None


def _norm_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    y, scale = _RmsNorm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    y.normed = Normed(x.detach(), module.weight, scale)
    return cast(torch.Tensor, y)
