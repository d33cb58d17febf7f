"""A run's story in sentences, and what its proof says."""

from __future__ import annotations

import pytest

from codegraft.common.v1.job_pb2 import JobState
from codegraft.trainer.v1 import run_event_pb2 as pb
from codegraft.trainer.v1.checkpoint_pb2 import Checkpoint
from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters, Plan
from codegraft.trainer.v1.run_event_pb2 import Proof, ProofFigures, RunEvent
from services.client.proof import proof_rows
from services.client.story import sentence

PROOF = Proof(
    verdict="better",
    base=ProofFigures(test_loss=2.0, next_line_edit_similarity=0.5),
    adapter=ProofFigures(test_loss=1.5, next_line_edit_similarity=0.625),
    test_files=3,
    test_loss_p=0.01,
)
PLAN = Plan(hyperparameters=Hyperparameters(train_steps=80), train_tokens=12345, epochs=1.5, estimated_seconds=90)
DATA = pb.DataMetrics(documents=1200, rows=30, labels=900, pieces=8, fim_pieces=4, padding=100)


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (RunEvent(plan=PLAN), "plan: 80 steps over 12,345 tokens (1.5 passes), about 1 min 30 s"),
        (
            RunEvent(data=DATA),
            "data: 1,200 files in 30 rows, 900 tokens to learn, 4 of 8 pieces with a middle to fill in, 10.0% padding",
        ),
        (RunEvent(evaluation=pb.EvalMetrics(step=0, test_loss=2)), "base model: test loss 2.0000"),
        (
            RunEvent(evaluation=pb.EvalMetrics(step=8, test_loss=1.5, foreign_loss=1)),
            "step 8: test loss 1.5000, on foreign code 1.0000",
        ),
        (RunEvent(checkpoint=Checkpoint(step=8, sha256="ab" * 32)), "step 8: checkpoint abababababab"),
        (RunEvent(best=Checkpoint(step=8, sha256="ab" * 32)), "step 8: best so far, version abababababab"),
        (RunEvent(state=JobState.JOB_STATE_PAUSED), "paused"),
        (RunEvent(note="the device changed"), "the device changed"),
        (RunEvent(proof=PROOF), "proof: test loss 2.0000 -> 1.5000, next lines 50.0 -> 62.5 % alike; better"),
        (RunEvent(step=pb.StepMetrics(step=1)), ""),
        (RunEvent(), ""),
    ],
    ids=lambda value: value.WhichOneof("event") or "none" if isinstance(value, RunEvent) else "",
)
def test_what_happened_is_one_sentence(event: RunEvent, said: str) -> None:
    assert sentence(event) == said


def test_every_kind_of_event_is_known() -> None:
    kinds = {field.name for field in RunEvent.DESCRIPTOR.oneofs_by_name["event"].fields}
    assert kinds == {"plan", "data", "step", "evaluation", "checkpoint", "best", "state", "note", "proof"}


def test_the_proof_as_a_table() -> None:
    assert proof_rows(PROOF) == [
        ["test loss (3 files)", "2.0000", "1.5000", "-25.0 %", "0.0100"],
        ["next line, edit similarity", "50.0 %", "62.5 %", "+12.5 points", "-"],
    ]
    (row,) = proof_rows(Proof(adapter=ProofFigures(test_loss=1)))
    assert row[3] == "-", "there is nothing to compare with"
