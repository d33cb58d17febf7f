"""The trainer's figures: of each project the run that told last."""

from __future__ import annotations

from services.core.telemetry.metrics import LONG, counter, gauge, histogram

TRAIN_LOSS = gauge("codegraft_trainer_train_loss", "Loss of the newest steps, nats per token.", "project")
TEST_LOSS = gauge("codegraft_trainer_test_loss", "Newest loss on the test set, nats per token.", "project")
BASE_LOSS = gauge("codegraft_trainer_base_test_loss", "The base model's loss on it, nats per token.", "project")
TOKENS_PER_SECOND = gauge("codegraft_trainer_tokens_per_second", "Tokens trained on, of the newest steps.", "project")
TOKENS = counter("codegraft_trainer_tokens_total", "Tokens trained on.")
STEPS = counter("codegraft_trainer_steps_total", "Steps taken.")
EVALUATION_SECONDS = histogram("codegraft_trainer_evaluation_seconds", "Evaluations on the test set.", buckets=LONG)
COMMIT_SECONDS = histogram(
    "codegraft_trainer_commit_seconds", "Checkpoints with their state, stored and recorded.", buckets=LONG
)
BESTS = counter("codegraft_trainer_bests_total", "Checkpoints that were better than all before.")
