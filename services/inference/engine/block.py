"""A decoder layer of the Llama family in as few operations as torch has for it.

For one token, calling torch takes as long as the arithmetic: transformers' own layer is some 95 calls, this one 40. It
computes the same. Other families keep transformers' layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from services.inference.adapters.lora import Joint
from services.inference.engine import attention_kernels, kernels
from services.inference.engine.attention import Step, keep, look
from services.inference.engine.blocks import BLOCK
from services.inference.engine.few import Heads

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
        self._layer, self.width, self._scale = attention.layer_idx, attention.head_dim, attention.scaling
        self._window = None
        if "Qwen2" in type(layer).__name__:
            self._window = attention.sliding_window
        elif "Mistral" in type(layer).__name__:
            self._window = attention.config.sliding_window
        self.joints: tuple[Joint, ...] = (self._qkv, self._o, self._gate_up, self._down)
        """Queries, keys and values; outputs; gate and up; down."""
        self.is_silu = type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        self._query_heads, kv_heads, _ = (out // attention.head_dim for out in self._qkv.outs)
        self._turned = self._query_heads + kv_heads

    @property
    def norms(self) -> tuple[Any, Any]:
        """Before the attention and before the MLP."""
        return self.input_layernorm, self.post_attention_layernorm

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
        if step.between is not None:
            step.between()
        x = hidden_states[0]
        qkv = self._qkv.compute(self.input_layernorm(x))
        if step.few is None or qkv.dtype != torch.float32:
            seen = self._many(qkv, position_embeddings, step)
        else:
            seen = qkv.new_empty(len(qkv), self._query_heads * self.width)
            cos, sin = position_embeddings
            self.few(Heads.of(qkv, seen, self.width), (cos.numpy(), sin.numpy()), step)
        x = self._o.compute(seen).add_(x)
        gate_up = self._gate_up.compute(self.post_attention_layernorm(x))
        gate, up = torch.split_with_sizes(gate_up, self._gate_up.outs, 1)
        return self._down.compute(self.mlp.act_fn(gate).mul_(up)).add_(x)[None]  # type: ignore[no-any-return]

    def _many(self, qkv: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor], step: Step) -> torch.Tensor:
        """From queries, keys and values to what is seen, ``[tokens, hidden]``."""
        tokens, kv = qkv.shape[0], step.kv[self._layer]
        halves = qkv.view(tokens, -1, 2, self.width // 2)[:, : self._turned]
        cos, sin = turns
        swapped = halves.flip(2)
        halves.mul_(cos).addcmul_(swapped, sin)
        heads = qkv.view(tokens, -1, self.width).transpose(0, 1)
        keep(heads[self._query_heads :].to(kv.dtype), kv, step)
        return look(heads[: self._query_heads], kv, step, self._scale, self._window).flatten(1)

    def few(self, heads: Heads, turns: tuple[Any, Any], step: Step) -> None:
        """The same for a few tokens on a CPU; all float32."""
        few = step.few
        assert few is not None
        kv = few.kv[self._layer]
        attention_kernels.turn(heads.turned, self._turned, *turns, kv, few.slots, few.begun)
        if few.tables is None:
            found = look(heads.queries, step.kv[self._layer], step, self._scale, self._window)
            heads.seen.copy_(found.flatten(1))
            return
        window = self._window or few.tables.size * BLOCK
        attend = attention_kernels.attend_in_threads if kernels.threads() > 1 else attention_kernels.attend
        attend(heads.all, kv, few.tables, few.pasts, window, self._scale, heads.out)


class Rotary(nn.Module):
    """The rotary embedding (arXiv:2104.09864) in the form in which :class:`Block` multiplies with it."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[tokens, 1, 2, head_dim / 2]``; the sines of the first half are negative."""
        cos, sin = (part[0].unflatten(1, (1, 2, -1)) for part in self.rotary(x, position_ids))
        first, second = sin.unbind(2)
        return cos, torch.stack([-first, second], 2)  # not times a constant, which would be copied to a GPU each step


def simplify(model: PreTrainedModel) -> None:
    """Replaces the decoder layers of a model of the family, after :func:`services.inference.adapters.lora.install`."""
    body: Any = model.base_model
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList) or any(type(layer).__name__ not in _FAMILY for layer in layers):
        return
    for index, layer in enumerate(layers):
        layers[index] = Block(layer)
    body.rotary_emb = Rotary(body.rotary_emb)
