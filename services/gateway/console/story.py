"""A run's story for the screen: points for the curves, and lines for the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from codegraft.trainer.v1.run_event_pb2 import Proof, ProofFigures, RunEvent
from services.gateway.console.words import duration, iso, job_state


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
        if text := line(event):
            lines.append((iso(event.time), text))
    return Points(train, test, best, speed, lines)


def line(event: RunEvent) -> str:
    """One line for what a person wants to know; empty for what the curves show."""
    match event.WhichOneof("event"):
        case "plan":
            plan = event.plan
            return (
                f"plan: {plan.hyperparameters.train_steps} steps over {plan.train_tokens:,} tokens "
                f"({plan.epochs:.1f} passes), about {duration(plan.estimated_seconds)}"
            )
        case "data":
            data = event.data
            return f"data: {data.documents:,} files in {data.rows:,} rows, {data.labels:,} tokens to learn"
        case "evaluation":
            what = "base model" if event.evaluation.step == 0 else f"step {event.evaluation.step}"
            foreign = event.evaluation.foreign_loss
            more = f", on foreign code {foreign:.4f}" if event.evaluation.HasField("foreign_loss") else ""
            return f"{what}: test loss {event.evaluation.test_loss:.4f}{more}"
        case "checkpoint":
            return f"step {event.checkpoint.step}: checkpoint {event.checkpoint.sha256[:12]}"
        case "best":
            return f"step {event.best.step}: best so far"
        case "state":
            return job_state(event.state)
        case "note":
            return event.note
        case "proof":
            return f"proof: {event.proof.verdict}"
        case _:
            return ""


_FIGURES = (
    ("test loss", "test_loss", "test_loss_p"),
    ("loss on foreign code", "foreign_loss", ""),
    ("next line, exact match", "next_line_exact_match", ""),
    ("next line, edit similarity", "next_line_edit_similarity", "next_line_p"),
    ("filled-in line, exact match", "fim_exact_match", ""),
    ("filled-in line, edit similarity", "fim_edit_similarity", "fim_p"),
)


def proof_rows(proof: Proof) -> list[tuple[str, str, str, str]]:
    """(what, base, adapter, p) of what was measured. p: how likely the adapter is not better."""
    return [
        (
            title,
            _figure(proof.base, name),
            _figure(proof.adapter, name),
            f"{getattr(proof, p):.4f}" if p and proof.HasField(p) else "-",
        )
        for title, name, p in _FIGURES
        if name == "test_loss" or proof.base.HasField(name)
    ]


def _figure(figures: ProofFigures, name: str) -> str:
    value: float = getattr(figures, name)
    return f"{value:.4f}" if name.endswith("loss") else f"{100 * value:.1f} %"
