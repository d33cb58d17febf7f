"""What a run's proof says: base model against adapter, for people."""

from __future__ import annotations

from codegraft.trainer.v1.run_event_pb2 import Proof, ProofFigures


def proof_rows(proof: Proof) -> list[list[object]]:
    """Rows of name, base, adapter, change and p (chance that the adapter is not better); "-" where there is none."""
    base, adapter = proof.base, proof.adapter
    files, lines, filled = proof.test_files, proof.next_line_places, proof.fim_places
    rows: list[list[object]] = [
        [f"test loss ({files} files)", *_loss(base.test_loss, adapter.test_loss), _p(proof, "test_loss_p")]
    ]
    if base.HasField("foreign_loss"):
        rows.append(["loss on foreign code", *_loss(base.foreign_loss, adapter.foreign_loss), "-"])
    for name, field, p in (
        (f"next line, exact match ({lines} places)", "next_line_exact_match", ""),
        ("next line, edit similarity", "next_line_edit_similarity", "next_line_p"),
        (f"filled-in line, exact match ({filled} places)", "fim_exact_match", ""),
        ("filled-in line, edit similarity", "fim_edit_similarity", "fim_p"),
    ):
        if base.HasField(field):
            rows.append([name, *_share(base, adapter, field), _p(proof, p) if p else "-"])
    return rows


def proof_line(proof: Proof) -> str:
    """The proof in one line."""
    base, adapter = proof.base, proof.adapter
    loss = f"test loss {base.test_loss:.4f} -> {adapter.test_loss:.4f}"
    lines = ""
    if base.HasField("next_line_edit_similarity"):
        before, after = base.next_line_edit_similarity, adapter.next_line_edit_similarity
        lines = f", next lines {100 * before:.1f} -> {100 * after:.1f} % alike"
    return f"proof: {loss}{lines}; {proof.verdict}"


def _loss(before: float, after: float) -> list[str]:
    return [f"{before:.4f}", f"{after:.4f}", f"{100 * (after / before - 1):+.1f} %" if before else "-"]


def _share(base: ProofFigures, adapter: ProofFigures, field: str) -> list[str]:
    before, after = getattr(base, field), getattr(adapter, field)
    return [f"{100 * before:.1f} %", f"{100 * after:.1f} %", f"{100 * (after - before):+.1f} points"]


def _p(proof: Proof, field: str) -> str:
    return f"{getattr(proof, field):.4f}" if proof.HasField(field) else "-"
