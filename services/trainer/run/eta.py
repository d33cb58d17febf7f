"""How long a run has still to go: steps and evaluations each take their own time, and each is counted."""

from __future__ import annotations

from collections import deque
from statistics import median

from services.trainer.planning.settings import Settings

RECENT = 15
"""Steps whose median says how long the next ones take: a machine that is busy for a moment changes nothing."""


class Estimate:
    """Seconds left of a run, from what its parts took so far. Knows no clock.

    Args:
        evaluated_step: step of the newest evaluation; -1 before the base model's.
        evaluation_seconds: what one took, where an earlier attempt measured it.
    """

    def __init__(self, settings: Settings, *, evaluated_step: int = -1, evaluation_seconds: float = 0.0) -> None:
        self._settings = settings
        self._evaluated = evaluated_step
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._evaluations: deque[float] = deque([evaluation_seconds] if evaluation_seconds else [], maxlen=3)
        self._commits: deque[float] = deque(maxlen=3)

    def step(self, seconds: float) -> None:
        """Takes in a step."""
        self._steps.append(seconds)

    def evaluation(self, step: int, seconds: float) -> None:
        """Takes in the evaluation at that step."""
        self._evaluated = step
        self._evaluations.append(seconds)

    def commit(self, seconds: float) -> None:
        """Takes in the commit of a checkpoint. Training goes on meanwhile: only the last one takes time of its own."""
        self._commits.append(seconds)

    def left(self, step: int, spent: float, closing: float = 0.0) -> float | None:
        """Seconds until the end; None before the first step of this attempt.

        An early end for want of gain cannot be foreseen.

        Args:
            step: steps taken.
            spent: seconds of the time limit that are spent.
            closing: seconds of what comes after the last evaluation, beside the last commit.
        """
        if not self._steps:
            return None
        seconds = (self._settings.train_steps - step) * median(self._steps)
        seconds += self._evaluations_due() * (median(self._evaluations) if self._evaluations else 0.0)
        seconds += max(closing, median(self._commits) if self._commits else 0.0)
        limit = self._settings.time_limit_seconds
        return seconds if limit is None else max(0.0, min(seconds, limit - spent))

    def _evaluations_due(self) -> int:
        """At each multiple of eval_steps that is still to come, and at the last step."""
        last, every, after = self._settings.train_steps, self._settings.eval_steps, max(0, self._evaluated)
        return last // every - after // every + (last > after and last % every != 0)
