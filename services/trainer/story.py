"""What a training loop tells, event by event."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from codegraft.trainer.v1.run_event_pb2 import Proof
from services.trainer.proving.evaluate import HeldOutLoss


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimizer step was taken."""

    step: int
    """From 1."""
    train_loss: float
    """Nats per token of its batch."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Tokens of its batch."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The test set was evaluated."""

    step: int
    """0 is before the first step."""
    test: HeldOutLoss
    seconds: float
    is_base: bool = False
    """Whether it is the base model's, without any adapter."""
    foreign_loss: float | None = None
    """Nats per token; None where it was not measured."""
    refused: str = ""
    """Why the adapter is not the best as it is although its test loss is the lowest, and what became of it."""


@dataclass(frozen=True, slots=True)
class CheckpointDue:
    """The adapter should be kept: as it is now, or as the best version has it."""

    step: int
    test_loss: float | None
    """None between evaluations."""
    is_best: bool
    """Lowest test loss so far, below the base model's, and no harm to foreign code: the weights are the state's."""


@dataclass(frozen=True, slots=True)
class Proved:
    """The best adapter was judged against the base model."""

    proof: Proof
    """Without the checkpoint's name."""


Event = StepDone | Evaluated | CheckpointDue | Proved
Story = Iterator[Event]
