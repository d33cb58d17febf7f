"""The arithmetic of one rate: a token bucket kept as one moment, as in the generic cell rate algorithm (GCRA).

A bucket holds a minute's limit and fills up evenly, so a whole minute's worth may come at once and then no more than
the limit a minute on average. All that is kept is the moment at which it will be full again; how much is missing until
then follows from it. ITU-T I.371, annex A; https://en.wikipedia.org/wiki/Generic_cell_rate_algorithm
"""

from __future__ import annotations

from dataclasses import dataclass

MINUTE = 60.0
_LONGEST = 3600.0
"""Seconds until a bucket is full, at most, by what others say: a wrong word shuts nobody out for longer."""


@dataclass(slots=True)
class Bucket:
    """One rate of one owner. Times are seconds of one clock, which never goes back."""

    full_at: float = 0.0

    def used(self, limit: int, now: float) -> float:
        """What is missing in it; more than the limit after something took more than was foreseen."""
        return max(0.0, self.full_at - now) * limit / MINUTE

    def wait(self, amount: float, limit: int, now: float) -> float:
        """Seconds until the amount is there; 0 when it is now.

        More than the limit, which never is, waits for a full bucket, and leaves a debt behind when it is taken.
        """
        if limit <= 0:
            return MINUTE if amount > 0 else 0.0
        missing = self.used(limit, now) + min(amount, limit) - limit
        # A bucket that was waited for may lack what a float cannot hold.
        return missing * MINUTE / limit if missing > 1e-6 * limit else 0.0

    def take(self, amount: float, limit: int, now: float) -> None:
        """Takes the amount, whether it is there or not; a negative one goes back, and no bucket is more than full."""
        if limit > 0:
            self.full_at = max(self.full_at, now) + amount * MINUTE / limit

    # --- what other processes took from theirs ------------------------------------------------------------------------

    def left(self, now: float) -> float:
        """Seconds until it is full: whatever the limit, what another process needs to begin where this one is."""
        return max(0.0, self.full_at - now)

    def others_took(self, amount: float, limit: int, now: float) -> None:
        """Takes what others let in already; so it may be late, and lack more than there ever was."""
        if limit > 0:
            took = max(self.full_at, now) + amount * MINUTE / limit
            self.full_at = min(took, max(self.full_at, now + _LONGEST))

    def not_before(self, seconds: float, now: float) -> None:
        """Others know that it is not full before so many seconds; who knew of more keeps to that."""
        self.full_at = max(self.full_at, now + min(seconds, _LONGEST))
