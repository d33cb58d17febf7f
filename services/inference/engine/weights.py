"""How the weights of a linear layer lie in memory, and so how fast its product is.

A decode step reads every weight once for a few tokens: it is as fast as memory, if the kernel lets it. torch's own
product of bfloat16 matrices reaches a third of that on a CPU. These come near it:

- a few tokens: our own compiled ones (engine/kernels.py), activations in float32, weights of 16 bits or 8, as they are;
- where these cannot be had: fbgemm's;
- many tokens: oneDNN, weights in its own blocked order.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from numba import get_num_threads
from torch.nn.functional import linear

from services.inference.engine import kernels

_FEW = 4
"""Tokens up to which 16 bits through fbgemm beat oneDNN: 9 against 17 ms for one token through SmolLM2-135M's layers on
one core, 16 for 4 by either, 24 against 20 for 8."""
_FEW_NARROW = 32
"""The same for 8 bits: 17 ms for 16 tokens, 50 to 80 for 64 by either."""

# Without their name's search for an overload, 5 microseconds a call.
_HALF = torch.ops.quantized.linear_dynamic_fp16.default
_NARROW = torch.ops.quantized.linear_dynamic.default


class Plain:
    """Any dtype on any device."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[tokens, in]`` to ``[tokens, out]``, as every other kind."""
        return linear(x, self.weight, self.bias)


class Rows16:
    """bfloat16 weights as they are, for a few tokens by :func:`services.inference.engine.kernels.half`."""

    most = 4
    """Tokens up to which a step of these beats one of torch's, of SmolLM2-135M on two cores: the products take 8 ms for
    one token and 11 for four, oneDNN's 12 and 10, and torch's calls around them 5 more."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight.bfloat16().contiguous().view(torch.uint16).numpy()
        self._bias = _bias(weight, bias)
        self.outs, self.width = weight.shape

    def add(self, x: Any, out: Any, *, keep: bool) -> None:
        """The product of ``[tokens, in]`` to, or with ``keep`` onto, ``[tokens, out]``: arrays of float32."""
        kernels.half(x, self._weight, self._bias, keep, out, get_num_threads())


class Rows8:
    """Weights of 8 bits with a scale for each output, for a few tokens by
    :func:`services.inference.engine.kernels.narrow`. The activations are not rounded."""

    most = 8
    """As above: 4 ms for one token, 7 for four, 13 for eight."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        exact = weight.float()
        scale = exact.abs().amax(1).clamp(min=1e-12) / 127
        self._weight = (exact / scale[:, None]).round().to(torch.int8).numpy()
        self._scale, self._bias = scale.numpy(), _bias(weight, bias)
        self.outs, self.width = weight.shape

    def add(self, x: Any, out: Any, *, keep: bool) -> None:
        """See :meth:`Rows16.add`."""
        kernels.narrow(x, self._weight, self._scale, self._bias, keep, out, get_num_threads())


Rows = Rows16 | Rows8


def _bias(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    return (torch.zeros(weight.shape[0]) if bias is None else bias.float()).numpy()


def _few(rows: Rows, x: torch.Tensor) -> torch.Tensor:
    x = x.float().contiguous()
    out = x.new_empty(x.shape[0], rows.outs)
    rows.add(x.numpy(), out.numpy(), keep=False)
    return out


class Half:
    """bfloat16 weights for a CPU, activations in float32: more exact than bfloat16 all through.

    Where it has to be fbgemm, that takes IEEE halves, which hold any bfloat16 of 6e-5 to 65504 as it is, and smaller
    ones to within 3e-8.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.rows: Rows | None = Rows16(weight, bias) if kernels.in_threads() else None
        if self.rows is None:
            exact = None if bias is None else bias.float()
            self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), exact)
        self._many = Blocked(weight, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows is not None and x.shape[0] <= self.rows.most:
            return _few(self.rows, x)
        if self.rows is None and x.shape[0] <= _FEW:
            product: torch.Tensor = _HALF(x.float(), self._packed)
            return product
        return self._many(x)


class Blocked:
    """bfloat16 weights in oneDNN's order; activations are float32 outside and bfloat16 within."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16().contiguous(), 256)
        self._bias = None if bias is None else bias.bfloat16()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self._weight, self._bias, "none", [], "")
        return product.float()  # type: ignore[no-any-return]


class Packed8:
    """Weights of 8 bits for fbgemm, which rounds activations to 8 bits, too, each token's with a scale of its own."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        exact = weight.float()
        scales = (exact.abs().amax(1).clamp(min=1e-12) / 127).double()
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():  # on their way out of torch, with nothing as fast in their place yet
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch.quantize_per_channel(exact, scales, zeros, 0, torch.qint8)
            self._few = torch.ops.quantized.linear_prepack(quantized, None)
        self._bias = None if bias is None else bias.float()
        # Without VNNI two products are summed in 16 bits, which 7 bits cannot overflow.
        self._reduced = not torch.cpu._is_vnni_supported()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        if len(x) == 1:
            product: torch.Tensor = _NARROW(x, self._few, self._reduced)
        else:
            # The kernel has one scale for all tokens: of the same size, a small one is not lost beside a large one.
            largest = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True).clamp_(min=1e-12)
            product = _NARROW(x / largest, self._few, self._reduced).mul_(largest)
        return product if self._bias is None else product.add_(self._bias)


class Narrow:
    """8 bits a weight with a scale for each output.

    More tokens are computed by 16 bits: these products are bound by arithmetic, and lose nothing.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.rows: Rows | None = Rows8(weight, bias) if kernels.in_threads() else None
        self._packed = None if self.rows else Packed8(weight, bias)
        self._many = Blocked(weight, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows is not None and x.shape[0] <= self.rows.most:
            return _few(self.rows, x)
        if self._packed is not None and x.shape[0] <= _FEW_NARROW:
            return self._packed(x)
        return self._many(x)


Product = Plain | Half | Narrow
