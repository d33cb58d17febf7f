"""Rates of projects and keys, each with its bucket in this process.

Every process has buckets of its own: a call costs no message to any other process, and NATS may be away. So a limit
holds at each process, and N replicas behind a balancer let through up to N times as much (docs/security.md says so). It
is what Envoy calls local rate limiting; a shared count would put a round trip before every completion.
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


class Rates:
    """One kind of rate. Belongs to one event loop.

    Args:
        limit: of an owner now; None for none.
        clock: seconds, never going back.
    """

    def __init__(
        self, kind: Kind, limit: Callable[[Kind, str], int | None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._kind, self._limit, self._clock = kind, limit, clock
        self._buckets: dict[str, Bucket] = {}

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
            self._bucket(owner, now).take(amount, limit, now)
        return Charge(self, [owner for owner, _ in limited], amount)

    def used(self, owner: str) -> int | None:
        """What has not come back yet of what an owner took in this process; None where it has no limit."""
        limit, bucket = self._limit(self._kind, owner), self._buckets.get(owner)
        if limit is None:
            return None
        return math.ceil(bucket.used(limit, self._clock())) if bucket else 0

    def correct(self, owners: Sequence[str], amount: int) -> None:
        """Takes so much more, or gives back a negative amount; refuses nothing."""
        now = self._clock()
        for owner in owners:
            if (limit := self._limit(self._kind, owner)) is not None:
                self._bucket(owner, now).take(amount, limit, now)

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
