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
"""Positions whose logits are made at once."""


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), CHUNK):
            part, wanted = hidden[start : start + CHUNK], labels[start : start + CHUNK]
            losses, probabilities = _cross_entropy(part @ head.T, wanted)
            total += losses.sum()
            probabilities.scatter_add_(1, wanted.clamp(min=0)[:, None], torch.full_like(probabilities[:, :1], -1.0))
            probabilities[wanted == IGNORED] = 0.0
            gradient[start : start + CHUNK] = probabilities.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None


def summed_loss(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum of the losses in nats, fp32, differentiable by the hidden states.

    Args:
        hidden: [tokens, hidden size], the model's last hidden states.
        head: [vocabulary, hidden size], frozen.
        labels: [tokens], the next token of each position, or IGNORED.
    """
    total: torch.Tensor = _SummedLoss.apply(hidden, head, labels)  # type: ignore[no-untyped-call]
    return total


def token_losses(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[tokens] losses in nats, fp32, without gradients; 0 where the label is IGNORED. Arguments as above."""
    return torch.cat(
        [
            _cross_entropy(hidden[start : start + CHUNK] @ head.T, labels[start : start + CHUNK])[0]
            for start in range(0, len(hidden), CHUNK)
        ]
    )


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [tokens] and probabilities [tokens, vocabulary], both fp32."""
    logits = logits.float()
    wanted = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    normalisers = logits.logsumexp(1)
    losses = torch.where(labels == IGNORED, 0.0, normalisers - wanted)
    return losses, logits.sub_(normalisers[:, None]).exp_()
