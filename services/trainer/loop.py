"""The training loop. It yields what happens and stops between two steps, so that whoever runs it decides the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from services.core.errors import JobCancelled
from services.trainer.corpus.data import IGNORED, Corpus
from services.trainer.judging import Judge, check_finite
from services.trainer.model.lora import Trainee
from services.trainer.planning.settings import Settings
from services.trainer.proving.evaluate import HeldOut
from services.trainer.proving.proof import Exam
from services.trainer.ranks import ALONE, Ranks
from services.trainer.state import State
from services.trainer.story import Event, StepDone


def make_optimizer(trainee: Trainee, settings: Settings) -> torch.optim.AdamW:
    """AdamW over the adapter's masters."""
    return torch.optim.AdamW(
        list(trainee.masters.values()), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )


def train(
    trainee: Trainee,
    optimizer: torch.optim.AdamW,
    settings: Settings,
    corpus: Corpus,
    test: HeldOut,
    state: State,
    is_cancelled: Callable[[], bool],
    initial: Callable[[], None] | None = None,
    exam: Exam | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[Event]:
    """Trains from ``state`` to the end of the settings, the time limit or the patience; then the best is judged.

    With more ranks every one of them runs this loop, over its share of each batch, and yields the same events.

    Args:
        initial: puts the weights of an earlier adapter on the trainee; None for a run that starts afresh. A best
            checkpoint then beats that adapter as well as the base model.
        exam: what is asked of base and adapter beside the test loss; None leaves it at that.

    Raises:
        JobCancelled: it was asked for; the model stands after the last whole step.
        TrainingDiverged: a loss or a gradient is no finite number; the model stands after the last good step.
    """
    judge = Judge(trainee, settings, test, exam, state, is_cancelled, ranks)
    is_cancelled = ranks.agreed(is_cancelled)
    state.tick()
    if state.step == 0 and state.base_loss is None:
        # A fresh adapter is zero, so that this is the base model's loss.
        yield judge.evaluate()
        if initial is not None:
            initial()
            yield judge.evaluate()
            state.evaluations_without_gain = 0
    if state.step and not state.ended and state.evaluated_step != state.step:
        # An earlier process may have been stopped in the middle of this evaluation.
        yield from judge.after_step(is_new=False)
    while not state.ended:
        before = state.tick()
        rows = corpus.batch(state.step, settings.batch_size)
        tokens = sum(label != IGNORED for row in rows for label in row.labels)
        share = ranks.share(rows)
        # Dropout is a function of step and rank: resume is exact.
        torch.manual_seed((settings.seed * 1_000_003 + state.step + (ranks.rank << 40)) % 2**63)
        loss = 0.0
        for start in range(0, len(share), settings.micro_batch_size):
            if is_cancelled():
                trainee.drop_gradients()
                raise JobCancelled(f"cancelled after step {state.step}")
            loss += trainee.accumulate(share[start : start + settings.micro_batch_size], tokens)
        trainee.take_gradients()
        ranks.sum_gradients(trainee.masters.values())
        [loss] = ranks.sum([loss])
        norm = torch.nn.utils.clip_grad_norm_(trainee.masters.values(), settings.max_grad_norm)
        check_finite(loss + float(norm), settings, state)
        rate = learning_rate(settings, state.step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        trainee.publish()
        state.step += 1
        state.step_seconds = state.tick() - before
        yield StepDone(state.step, loss / tokens, rate, float(norm), tokens, state.step_seconds)
        yield from judge.after_step(is_new=True)
    yield from judge.prove()


def learning_rate(settings: Settings, step: int) -> float:
    """Rises linearly over the warmup, then falls linearly to a tenth of the peak, where it stays.

    Args:
        step: from 0.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = min(1.0, (step - settings.warmup_steps) / settings.decay_steps)
    return settings.learning_rate * (1 - 0.9 * done)
