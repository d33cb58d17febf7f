"""A run's story for the screen: points for the curves, and sentences for the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from codegraft.trainer.v1.run_event_pb2 import RunEvent
from services.client.story import sentence
from services.gateway.console.words import iso


@dataclass(frozen=True, slots=True)
class Points:
    """What static/curves.js takes, as JSON."""

    train: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss in nats per token)"""
    test: list[tuple[int, float]] = field(default_factory=list)
    """The same on held-out files; step 0 is the base model."""
    best: list[tuple[int, float]] = field(default_factory=list)
    """Each new best; the last one counts."""
    speed: float = 0.0
    """Newest tokens a second; 0 when nothing new is known."""
    lines: list[tuple[str, str]] = field(default_factory=list)
    """(time, text) for the log."""


def points(events: Sequence[RunEvent]) -> Points:
    """What happened in some events, in their order."""
    train, test, best, speed, lines = [], [], [], 0.0, []
    for event in events:
        match event.WhichOneof("event"):
            case "step":
                train.append((event.step.step, event.step.train_loss))
                speed = event.step.tokens_per_second
            case "evaluation":
                test.append((event.evaluation.step, event.evaluation.test_loss))
            case "best":
                best.append((event.best.step, event.best.test_loss))
        if text := sentence(event):
            lines.append((iso(event.time), text))
    return Points(train, test, best, speed, lines)
