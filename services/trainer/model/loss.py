"""Cross-entropy over a frozen head, in chunks: the logits of a whole batch are never there at once.

With 49,152 tokens in the vocabulary the logits of 1,024 positions are 200 MB in fp32, and their gradient as much again.
The head is frozen, so the only gradient that is wanted is the hidden states', and that is at hand in the forward pass
(as in Liger-Kernel, https://arxiv.org/abs/2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch

IGNORED = -100
"""Label of a position without a loss."""
CHUNK = 256
"""Positions whose logits are made at once; the product with the head is slower with fewer."""
COLUMNS = 8_192
"""Entries of the vocabulary in one product: oneDNN makes a copy of that part of the head."""
CACHED = 8
"""Positions whose logits are in fp32 at once on a CPU: they stay in its cache."""


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        losses = []
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logits = _logits(hidden[part], head)
            losses.append(_cross_entropy(logits, labels[part], scale))
            gradient[part] = _to_hidden(logits, head)
        gradient.masked_fill_((labels == IGNORED)[:, None], 0.0)
        ctx.save_for_backward(gradient)
        ctx.scale = scale
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * (gradients[0] * ctx.scale).to(gradient.dtype), None, None, None


def summed_loss(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    """The sum of the losses in nats, fp32, differentiable by the hidden states.

    Args:
        hidden: [tokens, hidden size], the model's last hidden states.
        head: [vocabulary, hidden size], frozen.
        labels: [tokens], the next token of each position, or IGNORED.
        scale: what the product of both is multiplied with.
    """
    total: torch.Tensor = _SummedLoss.apply(hidden, head, labels, scale)  # type: ignore[no-untyped-call]
    return total


def token_losses(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    """[tokens] losses in nats, fp32, without gradients; 0 where the label is IGNORED. Arguments as above."""
    return torch.cat(
        [
            _cross_entropy(_logits(hidden[start : start + CHUNK], head), labels[start : start + CHUNK], scale)
            for start in range(0, len(hidden), CHUNK)
        ]
    )


def _logits(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """[tokens, vocabulary]"""
    logits = hidden.new_empty(len(hidden), len(head))
    for columns, rows in zip(torch.split(logits, COLUMNS, 1), torch.split(head, COLUMNS), strict=True):
        torch.mm(hidden, rows.t(), out=columns)
    return logits


def _to_hidden(gradient: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Gradient of the hidden states [tokens, hidden size] from that of the logits [tokens, vocabulary]."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    total = torch.zeros(len(gradient), head.shape[1], dtype=wide, device=head.device)
    for columns, rows in zip(torch.split(gradient, COLUMNS, 1), torch.split(head, COLUMNS), strict=True):
        total += torch.mm(columns, rows)
    return total


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
    """Losses [tokens] in fp32; their gradients by the scaled logits take the place of the logits [tokens, vocabulary].

    Where the label is IGNORED the loss is 0, and the gradient is whatever it is.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    found = []
    at_once = CACHED if logits.device.type == "cpu" else len(logits)
    for part, wanted in zip(torch.split(logits, at_once), torch.split(labels, at_once), strict=True):
        scaled = part.to(wide) * scale if scale != 1 else part.to(wide)
        at = wanted.clamp(min=0)[:, None]
        shares = scaled.softmax(1)
        # The largest share is never so small that its logarithm is lost.
        losses = scaled.amax(1) - shares.amax(1).log() - scaled.gather(1, at)[:, 0]
        found.append(losses.masked_fill_(wanted == IGNORED, 0.0))
        part.copy_(shares.scatter_add_(1, at, shares.new_full(at.shape, -1.0)))
    return torch.cat(found)
