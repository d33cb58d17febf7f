"""What is measured while a run trains, told in its story: steps (quick ones together) and evaluations."""

from __future__ import annotations

import time

from codegraft.event.v1.events_pb2 import RunMetric
from codegraft.trainer.v1.run_event_pb2 import Proof, RunEvent, StepMetrics
from codegraft.trainer.v1.run_pb2 import Run
from codegraft.trainer.v1.training_pb2 import SetEvaluated, StepTrained
from services.core import names
from services.core.telemetry import tracing
from services.core.telemetry.metrics import PROJECTS
from services.trainer import figures
from services.trainer.planning.settings import Settings
from services.trainer.run.telling import Teller

METRIC = "codegraft.trainer.run.metric.v1"
_STEP_SECONDS = 1.0
"""Steps that come faster are told together."""


class Metrics:
    """Tells the measurements of one attempt.

    Args:
        corpus_tokens: of one pass over the train part.
    """

    def __init__(self, teller: Teller, settings: Settings, corpus_tokens: int) -> None:
        self._teller = teller
        self._tokens_per_step = settings.batch_size * settings.context_length
        self._corpus_tokens = corpus_tokens
        self._project = PROJECTS.of(names.project_of(teller.run.name))
        self._steps: list[StepTrained] = []
        self._told = time.monotonic()

    async def step(self, done: StepTrained) -> None:
        """Tells a step, now or with the next ones."""
        self._steps.append(done)
        if time.monotonic() - self._told >= _STEP_SECONDS or done.step == 1:
            await self.flush()

    async def flush(self) -> None:
        """Tells the steps since the last time, together."""
        if not self._steps:
            return
        steps, self._steps, self._told = self._steps, [], time.monotonic()
        tokens, seconds = sum(step.tokens for step in steps), sum(step.seconds for step in steps)
        loss = sum(step.train_loss * step.tokens for step in steps) / tokens
        last = steps[-1]
        trained = last.step * self._tokens_per_step
        metrics = StepMetrics(
            step=last.step,
            train_loss=loss,
            learning_rate=last.learning_rate,
            grad_norm=last.grad_norm,
            tokens_per_second=tokens / max(1e-9, seconds),
            tokens=trained,
            epoch=trained / self._corpus_tokens,
        )

        def change(record: Run) -> None:
            record.step, record.train_loss = last.step, loss

        tracing.took("train steps", seconds, attributes={"codegraft.step": last.step, "codegraft.steps": len(steps)})
        figures.TRAIN_LOSS.labels(self._project).set(loss)
        figures.TOKENS_PER_SECOND.labels(self._project).set(metrics.tokens_per_second)
        figures.TOKENS.inc(tokens)
        figures.STEPS.inc(len(steps))
        await self._teller.tell(RunEvent(step=metrics), change)
        metric = RunMetric(run=self._teller.run.name, step=last.step, train_loss=loss)
        await self._teller.publish(METRIC, metric, f"step-{last.step}")

    async def evaluation(self, evaluated: SetEvaluated, *, is_base: bool) -> None:
        """Tells an evaluation; the one of an earlier run's adapter, before the first step, as a note."""
        await self.flush()
        found, refused = evaluated.metrics, evaluated.refused
        tracing.took("evaluate", found.seconds, attributes={"codegraft.step": found.step})
        figures.EVALUATION_SECONDS.observe(found.seconds)
        if found.step == 0 and not is_base:
            base = self._teller.run.base_test_loss
            await self._teller.note(
                f"the adapter it starts from has a test loss of {found.test_loss:.4f}, the base model {base:.4f}"
                + (f"; {refused}" if refused else "")
            )
            return

        def change(record: Run) -> None:
            record.test_loss = found.test_loss
            if is_base:
                record.base_test_loss = found.test_loss

        (figures.BASE_LOSS if is_base else figures.TEST_LOSS).labels(self._project).set(found.test_loss)
        await self._teller.tell(RunEvent(evaluation=found), change)
        metric = RunMetric(run=self._teller.run.name, step=found.step, test_loss=found.test_loss)
        await self._teller.publish(METRIC, metric, f"evaluation-{found.step}")
        if refused:
            await self._teller.note(f"step {found.step}: {refused}")

    async def proof(self, proof: Proof) -> None:
        """Tells how the best checkpoint compares with the base model."""
        proof.checkpoint = self._teller.run.best_checkpoint
        await self._teller.tell(RunEvent(proof=proof), lambda record: record.proof.CopyFrom(proof))
