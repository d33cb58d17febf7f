"""A step over a few tokens on a CPU with hardly any torch: one compiled call after the other, over the same arrays each
time. Products of more tokens than the kernels are good for are oneDNN's.

With weights of 8 bits, reading all of SmolLM2-135M's takes 5 ms on two cores. torch's 40 calls a layer took as long
again, and transformers' own code around them a millisecond more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import silu
from transformers import PreTrainedModel

from services.inference.adapters.lora import Active, Joint
from services.inference.engine.attention import Step
from services.inference.engine.block import Block, Rotary
from services.inference.engine.few import MOST, Heads, Sheet
from services.inference.engine.layers import Norm
from services.inference.engine.weights import Fast, Rows


def fits(model: PreTrainedModel) -> bool:
    """Whether all of a model is what is compiled here."""
    body: Any = model.base_model
    blocks = getattr(body, "layers", None) or [None]
    if not all(isinstance(block, Block) and block.is_silu for block in blocks):
        return False
    norms = [body.norm, *(norm for block in blocks for norm in block.norms)]
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    products = [joint.product for block in blocks for joint in block.joints] + [getattr(head, "product", None)]
    are_compiled = (isinstance(product, Fast) and isinstance(product.few, Rows) for product in products)
    return all(isinstance(norm, Norm) for norm in norms) and all(are_compiled)


@dataclass(slots=True)
class Desk:
    """What the layers write to, for one number of tokens."""

    hidden: Sheet
    """``[tokens, hidden]``, the residual stream."""
    normed: Sheet
    qkv: Sheet
    """``[tokens, queries, keys and values]``"""
    seen: Sheet
    """``[tokens, query heads * head_dim]``"""
    gate_up: Sheet
    """``[tokens, 2 * inner]``"""
    gated: Sheet
    heads: Heads
    """Of qkv and seen."""
    halves: tuple[torch.Tensor, torch.Tensor]
    """Of gate_up."""


class Product:
    """A joint of linear layers over arrays."""

    def __init__(self, joint: Joint, active: Active) -> None:
        assert isinstance(joint.product, Fast)
        self._packed, self.outs, self._paths, self._active = joint.product, joint.outs, joint.paths, active

    def add(self, x: Sheet, out: Sheet, *, keep: bool) -> None:
        """See :meth:`services.inference.engine.weights.Fast.add`; with what the step's adapters give."""
        self._packed.add(x, out, keep=keep)
        if (mix := self._active.mix) is not None:
            mix.add_few(self._paths, x, out)


class CompiledLayer:
    """One layer; its weights are the block's."""

    def __init__(self, block: Block, active: Active) -> None:
        self._block = block
        self._before, self._between = block.norms
        self.qkv, self.o, self.gate_up, self.down = (Product(joint, active) for joint in block.joints)

    def run(self, desk: Desk, turns: tuple[Any, Any], step: Step) -> None:
        """Changes the desk's hidden states as the layer does."""
        self._before.into(desk.hidden.array, desk.normed.array)
        self.qkv.add(desk.normed, desk.qkv, keep=False)
        self._block.few(desk.heads, turns, step)
        self.o.add(desk.seen, desk.hidden, keep=True)
        self._between.into(desk.hidden.array, desk.normed.array)
        self.gate_up.add(desk.normed, desk.gate_up, keep=False)
        gate, up = desk.halves
        torch.mul(silu(gate), up, out=desk.gated.tensor)
        self.down.add(desk.gated, desk.hidden, keep=True)


class Compiled:
    """A whole model; its weights are the model's.

    Args:
        model: one for which :func:`fits` says so.
        active: sets the adapters of a step.
    """

    def __init__(self, model: PreTrainedModel, active: Active) -> None:
        body: Any = model.base_model
        self._layers = [CompiledLayer(block, active) for block in body.layers]
        self._table: torch.Tensor = body.embed_tokens.weight
        self._rotary: Rotary = body.rotary_emb
        self._norm: Norm = body.norm
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._head: Fast = head.product
        first, hidden = self._layers[0], self._table.shape[1]
        both, seen = sum(first.gate_up.outs), first.qkv.outs[0]
        self._width = body.layers[0].width
        widths = (hidden, hidden, sum(first.qkv.outs), seen, both, both // 2)
        self._all = [torch.empty(MOST, width, dtype=torch.float32) for width in widths]
        self._desks: dict[int, Desk] = {}

    def logits(self, ids: list[int], positions: list[int], last: list[int], step: Step) -> torch.Tensor:
        """``[last, embeddings]``, float32.

        Args:
            last: tokens whose outputs are wanted.
        """
        desk = self._desk(len(ids))
        desk.hidden.tensor.copy_(self._table[torch.tensor(ids)])
        cos, sin = self._rotary(desk.hidden.tensor[None], torch.tensor([positions]))
        turns = cos.numpy(), sin.numpy()
        for layer in self._layers:
            if step.between is not None:
                step.between()
            layer.run(desk, turns, step)
        self._norm.into(desk.hidden.array, desk.normed.array)
        normed = desk.normed.tensor
        return self._head(normed if len(last) == len(ids) else normed[last])

    def _desk(self, tokens: int) -> Desk:
        if tokens not in self._desks:
            hidden, normed, qkv, seen, gate_up, gated = (Sheet.of(part[:tokens]) for part in self._all)
            heads = Heads.of(qkv.tensor, seen.tensor, self._width)
            gate, up = gate_up.tensor.chunk(2, 1)
            self._desks[tokens] = Desk(hidden, normed, qkv, seen, gate_up, gated, heads, (gate, up))
        return self._desks[tokens]
