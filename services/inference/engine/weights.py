"""How the weights of a linear layer lie in memory, and so how fast its product is.

A decode step reads every weight once for a few tokens: it is as fast as memory, if the kernel lets it. torch's own
product of bfloat16 matrices reaches a third of that on a CPU. These come near it:

- a few tokens: our own compiled ones (engine/kernels.py), activations in float32, weights of 16 bits or 8, as they are;
- where these cannot be had: fbgemm's;
- many tokens: oneDNN, weights in its own blocked order, or fbgemm where the processor has no products of bfloat16.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch.nn.functional import linear

from services.core.models.weights import quick_dtype
from services.inference.engine import kernels
from services.inference.engine.few import Sheet

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


class Rows(ABC):
    """Weights as they are, for our own kernels; activations are float32."""

    most: int
    """Tokens up to which these beat oneDNN, which takes as long for one as for eight: reading the weights."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.outs, self.width = weight.shape
        self._bias = (torch.zeros(self.outs) if bias is None else bias.float()).numpy()

    @abstractmethod
    def add(self, x: Any, out: Any, *, keep: bool) -> None:
        """The product of ``[tokens, in]`` to, or with ``keep`` onto, ``[tokens, out]``: arrays of float32."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float().contiguous()
        out = x.new_empty(x.shape[0], self.outs)
        self.add(x.numpy(), out.numpy(), keep=False)
        return out


class Rows16(Rows):
    """bfloat16."""

    most = 2
    """On two cores SmolLM2-135M's products take 8 ms for one token and 11 for four, oneDNN's 12 and 10. On one a whole
    step of four takes 31 ms by these and 25 by oneDNN, of two 22 and 28."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight, bias)
        self._weight = weight.bfloat16().contiguous().view(torch.uint16).numpy()

    def add(self, x: Any, out: Any, *, keep: bool) -> None:
        kernels.half(x, self._weight, self._bias, keep, out, kernels.threads())


class Rows8(Rows):
    """8 bits with a scale for each output."""

    most = 6
    """As above: 4 ms for one token, 7 for four, 13 for eight."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight, bias)
        exact, scale = weight.float(), _scale(weight)
        self._weight = (exact / scale[:, None]).round().to(torch.int8).numpy()
        self._scale = scale.numpy()

    def add(self, x: Any, out: Any, *, keep: bool) -> None:
        kernels.narrow(x, self._weight, self._scale, self._bias, keep, out, kernels.threads())


class Packed16:
    """IEEE halves for fbgemm, activations in float32.

    They hold any bfloat16 of 6e-5 to 65504 as it is, and smaller ones to within 3e-8.
    """

    most = 4
    """On one core they take 9 ms for one token, oneDNN's 17; 16 for four by either, 24 against 20 for eight. Where
    there are no products of bfloat16 they take for 1, 16 and 256 tokens 11, 32 and 380 ms on two cores; oneDNN's of
    float32 21, 48 and 376, from twice the memory."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        exact = None if bias is None else bias.float()
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), exact)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _HALF(x.float(), self._packed)  # type: ignore[no-any-return]


class Packed8:
    """8 bits for fbgemm, which rounds activations to 8 bits, too, each token's with a scale of its own."""

    most = 32
    """As above: 17 ms for 16 tokens, 50 to 80 for 64 by either."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        scales = _scale(weight).double()
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():  # on their way out of torch, with nothing as fast in their place yet
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch.quantize_per_channel(weight.float(), scales, zeros, 0, torch.qint8)
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        self._bias = None if bias is None else bias.float()
        # Without VNNI two products are summed in 16 bits, which 7 bits cannot overflow.
        self._reduced = not torch.cpu._is_vnni_supported()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        if len(x) == 1:
            product: torch.Tensor = _NARROW(x, self._packed, self._reduced)
        else:
            # The kernel has one scale for all tokens: of the same size, a small one is not lost beside a large one.
            largest = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True).clamp_(min=1e-12)
            product = _NARROW(x / largest, self._packed, self._reduced).mul_(largest)
        return product if self._bias is None else product.add_(self._bias)


_EXACTLY, _ROUNDED = 32, 16
"""Tokens up to which a product is of their number; of more, it is of the next multiple. oneDNN keeps code for each
number that it has seen, half a megabyte for each of a layer's products: 256 numbers of tokens are 500 MB."""


class Blocked:
    """bfloat16 weights in oneDNN's order; activations are float32 outside and bfloat16 within."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16().contiguous(), 256)
        self._bias = None if bias is None else bias.bfloat16()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        count = x.shape[0]
        rounded = count if count <= _EXACTLY else -(-count // _ROUNDED) * _ROUNDED
        inputs = x.bfloat16() if count == rounded else x.new_zeros(rounded, x.shape[1], dtype=torch.bfloat16)
        if count < rounded:
            inputs[:count] = x
        product = torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self._bias, "none", [], "")
        return product[:count].float()  # type: ignore[no-any-return]


class Fast:
    """Weights twice, for a few tokens and for many, on a CPU.

    Many are computed by 16 bits, narrow weights or not: these products are bound by arithmetic, and lose nothing. A few
    are with float32 activations, but by fbgemm's 8 bits: more exact than bfloat16 all through.

    Args:
        narrow: a few are computed by 8 bits.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, narrow: bool) -> None:
        kinds = (Rows16, Rows8) if kernels.in_threads() else (Packed16, Packed8)
        self.few: Rows | Packed16 | Packed8 = kinds[narrow](weight, bias)
        if quick_dtype("cpu") == torch.bfloat16:
            self._many: Blocked | Packed16 = Blocked(weight, bias)
        else:
            self._many = self.few if isinstance(self.few, Packed16) else Packed16(weight, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.few(x) if x.shape[0] <= self.few.most else self._many(x)

    def add(self, x: Sheet, out: Sheet, *, keep: bool) -> None:
        """The same to, or with ``keep`` onto, ``out``."""
        if isinstance(self.few, Rows) and len(x.array) <= self.few.most:
            self.few.add(x.array, out.array, keep=keep)
        elif keep:
            out.tensor.add_(self(x.tensor))
        else:
            out.tensor.copy_(self(x.tensor))


Product = Plain | Fast


def _scale(weight: torch.Tensor) -> torch.Tensor:
    """What 1 stands for in 8 bits, ``[out]``."""
    return weight.float().abs().amax(1).clamp(min=1e-12) / 127
