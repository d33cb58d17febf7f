"""How fast a job is, as far as that can honestly be said."""

from __future__ import annotations

import math

WINDOW = 20.0
"""Seconds over which the rate is smoothed: older observations count for less than a third."""
LEAST_SECONDS = 1.0
LEAST_STEPS = 2
"""Nothing is said before so many seconds and so many steps forward were seen."""


class RateEstimate:
    """Units per second: units over seconds, both with weights that fade exponentially.

    The ratio of two faded sums has no start-up bias, unlike a faded mean of single rates.
    """

    def __init__(self) -> None:
        self._unit = ""
        self._start: float | None = None
        self._done = 0.0
        self._now = 0.0
        self._units = 0.0
        self._seconds = 0.0
        self._steps = 0

    def add(self, unit: str, done: float, now: float) -> float | None:
        """Takes in an observation; returns the rate, or None while too little was seen.

        Another unit, or fewer units done than before, begins a new estimate.

        Args:
            done: units done so far.
            now: seconds on a monotonic clock.
        """
        if self._start is None or unit != self._unit or done < self._done:
            self._unit, self._start, self._done, self._now = unit, now, done, now
            self._units = self._seconds = 0.0
            self._steps = 0
            return None
        fade = math.exp(-(now - self._now) / WINDOW)
        self._units = self._units * fade + (done - self._done)
        self._seconds = self._seconds * fade + (now - self._now)
        self._steps += done > self._done
        self._done, self._now = done, now
        if self._steps < LEAST_STEPS or now - self._start < LEAST_SECONDS:
            return None
        return self._units / self._seconds
