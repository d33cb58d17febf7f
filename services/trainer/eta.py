"""How long a run has still to go: steps, evaluations and commits each take their own time, and each is counted."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from services.trainer.settings import Settings

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
        self._committed = evaluated_step
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

    def commit(self, step: int, seconds: float) -> None:
        """Takes in the commit of that step's checkpoint."""
        self._committed = step
        self._commits.append(seconds)

    def left(self, step: int, spent: float, closing: float = 0.0) -> float | None:
        """Seconds until the end; None before the first step of this attempt.

        An early end for want of gain cannot be foreseen. Every evaluation is expected to find a new best, which is
        committed.

        Args:
            step: steps taken.
            spent: seconds of the time limit that are spent.
            closing: seconds of what comes after the last commit.
        """
        if not self._steps:
            return None
        every = self._settings.eval_steps, self._settings.checkpoint_steps
        evaluations = self._due(self._evaluated, every[0])
        commits = self._due(self._committed, *every)
        seconds = closing + (self._settings.train_steps - step) * median(self._steps)
        seconds += evaluations * (median(self._evaluations) if self._evaluations else 0.0)
        seconds += commits * (median(self._commits) if self._commits else 0.0)
        limit = self._settings.time_limit_seconds
        return seconds if limit is None else max(0.0, min(seconds, limit - spent))

    def _due(self, after: int, *every: int) -> int:
        """Steps later than ``after`` that are the last one, or a multiple of one of ``every``."""
        last, after = self._settings.train_steps, max(0, after)

        def multiples(of: int) -> int:
            return last // of - after // of

        count = sum(multiples(one) for one in every)
        if len(every) == 2:
            count -= multiples(math.lcm(*every))
        return count + (last > after and all(last % one for one in every))
