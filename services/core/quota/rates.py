"""Rates of projects and keys, each with its bucket in this process.

A call costs no message to any other process, and NATS may be away: what this process let in goes to the others a moment
later, and what they let in comes from them (services/core/quota/exchange.py). A shared count would put a round trip
before every completion.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.core.quota.bucket import Bucket
from services.core.quota.limits import Kind
from services.core.quota.refusal import refuse

MOST_BUCKETS = 10_000
"""From so many on, full buckets are thrown away, which changes nothing: names of callers must not fill the memory."""
MUCH = 1 / 20
"""Part of a limit that the others hear of at once: a burst at all replicas would be over before the next word."""


class Rates:
    """One kind of rate. Belongs to one event loop.

    Args:
        limit: of an owner now; None for none.
        clock: seconds, never going back.

    Attributes:
        hurry: called when the others should hear of something at once. What is to be told is collected once it is set.
    """

    def __init__(
        self, kind: Kind, limit: Callable[[Kind, str], int | None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._kind, self._limit, self._clock = kind, limit, clock
        self._buckets: dict[str, Bucket] = {}
        self._untold: dict[str, int] = {}
        self.hurry: Callable[[], None] | None = None

    def take(self, owners: Sequence[str], amount: int = 1) -> Charge:
        """Takes the amount from the bucket of every owner, or from none.

        Raises:
            QuotaExceeded: one of them has not so much now.
        """
        now = self._clock()
        limited = [(owner, limit) for owner in owners if (limit := self._limit(self._kind, owner)) is not None]
        for owner, limit in limited:
            bucket = self._buckets.get(owner) or Bucket()
            if wait := bucket.wait(amount, limit, now):
                raise refuse(self._kind, owner, limit, math.ceil(bucket.used(limit, now)), amount, wait)
        for owner, limit in limited:
            self._take(owner, amount, limit, now)
        return Charge(self, [owner for owner, _ in limited], amount)

    def used(self, owner: str) -> int | None:
        """What has not come back yet of what an owner took, as far as this process knows; None without a limit."""
        limit, bucket = self._limit(self._kind, owner), self._buckets.get(owner)
        if limit is None:
            return None
        return math.ceil(bucket.used(limit, self._clock())) if bucket else 0

    def correct(self, owners: Sequence[str], amount: int) -> None:
        """Takes so much more, or gives back a negative amount; refuses nothing."""
        now = self._clock()
        for owner in owners:
            if (limit := self._limit(self._kind, owner)) is not None:
                self._take(owner, amount, limit, now)

    # --- for and from the other processes -----------------------------------------------------------------------------

    def untold(self) -> dict[str, int]:
        """What owners took here since the last time that this was asked; negative where they gave back more."""
        untold, self._untold = self._untold, {}
        return {owner: amount for owner, amount in untold.items() if amount}

    def others_took(self, owner: str, amount: int) -> None:
        """Another process let so much in."""
        if (limit := self._limit(self._kind, owner)) is not None:
            now = self._clock()
            self._bucket(owner, now).others_took(amount, limit, now)

    def left(self) -> dict[str, float]:
        """Seconds until each bucket is full again, of those that are not."""
        now = self._clock()
        return {owner: left for owner, bucket in self._buckets.items() if (left := bucket.left(now)) > 0}

    def not_before(self, owner: str, seconds: float) -> None:
        """Another process knows that an owner's bucket is not full before so many seconds."""
        if self._limit(self._kind, owner) is not None:
            now = self._clock()
            self._bucket(owner, now).not_before(seconds, now)

    def _take(self, owner: str, amount: int, limit: int, now: float) -> None:
        self._bucket(owner, now).take(amount, limit, now)
        if self.hurry is not None:
            self._untold[owner] = untold = self._untold.get(owner, 0) + amount
            if abs(untold) > limit * MUCH:
                self.hurry()

    def _bucket(self, owner: str, now: float) -> Bucket:
        if owner not in self._buckets and len(self._buckets) >= MOST_BUCKETS:
            self._buckets = {name: bucket for name, bucket in self._buckets.items() if bucket.full_at > now}
        return self._buckets.setdefault(owner, Bucket())


@dataclass(slots=True)
class Charge:
    """What one call was let in with, until it is known what it took."""

    rates: Rates
    owners: Sequence[str]
    amount: int
    _settled: bool = field(default=False, init=False)

    def settle(self, amount: int) -> None:
        """Makes it what the call really took; only the first time counts."""
        if not self._settled:
            self._settled = True
            self.rates.correct(self.owners, amount - self.amount)
