"""How long to wait before the next try: exponential, bounded, and spread so that many waiters do not come at once."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class Backoff:
    """A schedule of waits. Attempt n (from 0) waits between half of and the whole of ``first * factor**n``."""

    first: timedelta = timedelta(milliseconds=200)
    """Longest wait before the second try."""
    longest: timedelta = timedelta(seconds=5)
    """No wait is longer, however many tries failed."""
    factor: float = 2.0
    """Growth from one wait to the next."""

    def delay(self, attempt: int) -> float:
        """Seconds to wait after the given attempt failed.

        The lower half is fixed so that a broken peer is never hammered; the upper half is random so that replicas
        which failed together do not come back together.
        """
        bound = self.longest.total_seconds()
        exponent = min(attempt, 64)  # a float power beyond this would overflow long after the bound was reached
        whole = min(bound, self.first.total_seconds() * self.factor**exponent)
        return random.uniform(whole / 2, whole)
