"""A run's story in sentences: the command line prints them, the console's log shows them."""

from __future__ import annotations

from codegraft.trainer.v1.run_event_pb2 import RunEvent
from services.client.proof import proof_line
from services.client.words import duration, state_word


def sentence(event: RunEvent) -> str:
    """One line for what a person wants to know; empty for what only moves bars and curves."""
    match event.WhichOneof("event"):
        case "plan":
            plan = event.plan
            return (
                f"plan: {plan.hyperparameters.train_steps} steps over {plan.train_tokens:,} tokens "
                f"({plan.epochs:.1f} passes), about {duration(plan.estimated_seconds)}"
            )
        case "data":
            data = event.data
            return (
                f"data: {data.documents:,} files in {data.rows:,} rows, {data.labels:,} tokens to learn, "
                f"{data.fim_pieces:,} of {data.pieces:,} pieces with a middle to fill in, "
                f"{data.padding / max(1, data.padding + data.labels):.1%} padding"
            )
        case "evaluation":
            what = "base model" if event.evaluation.step == 0 else f"step {event.evaluation.step}"
            foreign = event.evaluation.foreign_loss
            more = f", on foreign code {foreign:.4f}" if event.evaluation.HasField("foreign_loss") else ""
            return f"{what}: test loss {event.evaluation.test_loss:.4f}{more}"
        case "checkpoint":
            return f"step {event.checkpoint.step}: checkpoint {event.checkpoint.sha256[:12]}"
        case "best":
            return f"step {event.best.step}: best so far, version {event.best.sha256[:12]}"
        case "state":
            return state_word(event.state)
        case "note":
            return event.note
        case "proof":
            return proof_line(event.proof)
        case _:
            return ""
