"""A decoder layer of the Llama family in as few operations as torch has for it.

For one token, calling torch takes as long as the arithmetic: transformers' own layer is some 95 calls, this one 40. It
computes the same. Other families keep transformers' layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from services.inference.engine.attention import Step, keep, look

_FAMILY = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "MistralDecoderLayer")
"""Two norms, rotary embeddings by halves, a gated MLP, and nothing else."""


class Block(nn.Module):
    """Takes a layer's place; its parts stay its own, as what is packed or adapted is in them."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        attention, mlp = layer.self_attn, layer.mlp
        self._qkv, self._o = attention.q_proj.joint, attention.o_proj.joint
        self._gate_up, self._down = mlp.gate_proj.joint, mlp.down_proj.joint
        self._window = None
        if "Qwen2" in type(layer).__name__:
            self._window = attention.sliding_window
        elif "Mistral" in type(layer).__name__:
            self._window = attention.config.sliding_window
        self._query_heads, kv_heads, _ = (out // attention.head_dim for out in self._qkv.outs)
        self._turned = self._query_heads + kv_heads

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        step: Step,
        **_: Any,
    ) -> torch.Tensor:
        """``[1, tokens, hidden]``, both ways.

        Args:
            position_embeddings: from :class:`Rotary`.
        """
        x, attention = hidden_states[0], self.self_attn
        qkv = self._qkv.compute(self.input_layernorm(x))
        halves = qkv.view(x.shape[0], -1, 2, attention.head_dim // 2)[:, : self._turned]
        cos, sin = position_embeddings
        swapped = halves.flip(2)
        halves.mul_(cos).addcmul_(swapped, sin)
        kv = step.kv[attention.layer_idx]
        heads = qkv.to(kv.dtype).view(x.shape[0], -1, attention.head_dim).transpose(0, 1)
        keep(heads[self._query_heads :], kv, step)
        seen = look(heads[: self._query_heads], kv, step, attention.scaling, self._window)
        x = self._o.compute(seen.flatten(1)).add_(x)
        gate_up = self._gate_up.compute(self.post_attention_layernorm(x))
        gate, up = torch.split_with_sizes(gate_up, self._gate_up.outs, 1)
        return self._down.compute(self.mlp.act_fn(gate).mul_(up)).add_(x)[None]  # type: ignore[no-any-return]


class Rotary(nn.Module):
    """The rotary embedding (arXiv:2104.09864) in the form in which :class:`Block` multiplies with it."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[tokens, 1, 2, head_dim / 2]``; the sines of the first half are negative."""
        cos, sin = (part[0].unflatten(1, (1, 2, -1)) for part in self.rotary(x, position_ids))
        return cos, sin * torch.tensor([[-1.0], [1.0]], dtype=sin.dtype, device=sin.device)


def simplify(model: PreTrainedModel) -> None:
    """Replaces the decoder layers of a model of the family, after :func:`services.inference.adapters.lora.install`."""
    body: Any = model.base_model
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList) or any(type(layer).__name__ not in _FAMILY for layer in layers):
        return
    for index, layer in enumerate(layers):
        layers[index] = Block(layer)
    body.rotary_emb = Rotary(body.rotary_emb)
