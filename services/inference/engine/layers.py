"""A model made fast for a CPU, in place: weights packed for its kernels, float32 between them, fused norms.

transformers' modules stay what they are but for those that are replaced here, so that this goes for every architecture
of the catalogue. Keys and values stay in the model's own type.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from services.inference.adapters.lora import Joint, joints
from services.inference.engine import kernels
from services.inference.engine.few import MOST
from services.inference.engine.weights import Fast, Plain, Product

Kind = Literal["auto", "bf16", "int8"]
_FIRST = 2
"""Where activations are rounded to 8 bits, too (fbgemm), so many layers at the begin, the last one and the output head
keep 16: with 8 they lose as much as all others. Without that 8 bits everywhere lose 0.5 % of the loss on code."""


def packs(device: str) -> bool:
    """Whether :func:`speed_up` does something for a bfloat16 model there: fbgemm needs a CPU with AVX2."""
    return device == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


def speed_up(model: PreTrainedModel, kind: Kind) -> None:
    """Packs the weights of a bfloat16 model on a CPU that has the kernels; any other stays as it is.

    Args:
        model: with its linear layers joined by :func:`services.inference.adapters.lora.install`.
        kind: see ``InferenceSettings.inference_weights``.
    """
    if model.dtype != torch.bfloat16 or not packs(model.device.type):
        return
    found = joints(model)
    last = max((_layer(joint) for joint in found), default=0)
    for joint in found:
        if isinstance(joint.product, Plain):
            narrow = kind == "int8" and (kernels.in_threads() or _FIRST <= _layer(joint) < last)
            joint.product = Fast(joint.product.weight, joint.product.bias, narrow=narrow)
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if isinstance(head, nn.Linear):
        model.set_output_embeddings(Head(head, kind))  # type: ignore[no-untyped-call]
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(_widen)
    table = embeddings.weight
    for parameter in model.parameters():
        if parameter is not table:
            parameter.data = parameter.data.float()
    for path, module in list(model.named_modules()):
        if type(module).__name__ in _NORMS:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Norm(module))


def _layer(joint: Joint) -> int:
    """The number of the decoder layer that it is in, the first number in its path."""
    return int(next((part for part in joint.paths[0].split(".") if part.isdigit()), "0"))


class Head(nn.Module):
    """The output head with packed weights; an embedding that is tied to it keeps its own."""

    def __init__(self, head: nn.Linear, kind: Kind) -> None:
        super().__init__()
        bias = None if head.bias is None else head.bias.detach()
        self.product: Product = Fast(head.weight.detach(), bias, narrow=kind == "int8" and kernels.in_threads())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[1, tokens, hidden]`` to ``[1, tokens, embeddings]``."""
        return self.product(x[0])[None]


_NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm", "GraniteRMSNorm")
"""Those whose weight is a plain factor (Gemma's is not)."""


class Norm(nn.Module):
    """Root mean square normalization (arXiv:1910.07467) of float32, in one operation for a few tokens, else in four.

    With n inputs, ``w x / sqrt(|x|^2 / n + eps)`` is ``w sqrt(n) x / hypot(|x|, sqrt(n eps))``.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        count = norm.weight.numel()
        self.weight = nn.Parameter(norm.weight.float() * count**0.5, requires_grad=False)
        self._least = (count * norm.variance_epsilon) ** 0.5
        self._array = self.weight.detach().numpy()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Over the last dimension."""
        if x.numel() <= MOST * x.shape[-1]:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
            # Queries and keys of several tokens are pieces of one product, which no view makes rows.
            self.into(x.reshape(-1, x.shape[-1]).numpy(), out.view(-1, x.shape[-1]).numpy())
            return out
        size = torch.linalg.vector_norm(x, 2, -1, keepdim=True)
        normed: torch.Tensor = x / size.hypot_(torch.tensor(self._least))
        return normed.mul_(self.weight)

    def into(self, x: Any, out: Any) -> None:
        """A few tokens, arrays ``[tokens, width]``."""
        kernels.norm(x, self._array, self._least, out)


def _widen(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.float()
