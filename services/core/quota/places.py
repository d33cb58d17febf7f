"""Places for what lasts (runs, scans, stored bytes), given by compare-and-set: two calls never get the last one.

What is used is counted in the records themselves, which cannot drift. Between the count and the new record lies a gap,
through which two calls at once, at two replicas even, would both slip: so whoever is let in first writes a claim into
one small record of its owner, under the revision that it had before the count. Of two only one write succeeds, and the
other counts again, the first one's claim with it. The claim goes once the thing has a record of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from codegraft.access.v1.quota_pb2 import StoredPlace, StoredPlaces
from services.core.backoff import Backoff
from services.core.errors import Aborted, CodegraftError, ResourceExists, RevisionMismatch
from services.core.quota.limits import Kind
from services.core.quota.quotas import Quotas
from services.core.quota.refusal import refuse
from services.core.state import StateStore

Used = Callable[[str], Awaitable[Mapping[str, int]]]
"""Of an owner: resource names, and how much each takes."""
_TRIES = 50
_WAITS = Backoff(first=timedelta(milliseconds=2), longest=timedelta(milliseconds=100))


@dataclass(frozen=True, slots=True)
class Room:
    """What an owner had left at one moment."""

    kind: Kind
    owner: str
    limit: int
    taken: int
    retry: float
    """Seconds after which there may be more."""

    @property
    def left(self) -> int:
        """How much that is."""
        return max(0, self.limit - self.taken)

    def check(self, amount: int) -> None:
        """Raises QuotaExceeded when the amount is more than is left."""
        if amount > self.left:
            raise refuse(self.kind, self.owner, self.limit, self.taken, amount, self.retry)


class Places:
    """Places of one kind.

    Args:
        state: a bucket of the service itself.
        used: counts the records of an owner.
        lasts: a claim whose process died is void after this time.
        retry: when there may be room for an owner that has none.
    """

    def __init__(
        self,
        quotas: Quotas,
        kind: Kind,
        state: StateStore,
        used: Used,
        *,
        lasts: timedelta = timedelta(minutes=1),
        retry: Callable[[str], Awaitable[float]],
    ) -> None:
        self._quotas, self._kind, self._state = quotas, kind, state
        self._used, self._lasts, self._retry = used, lasts, retry

    @contextlib.asynccontextmanager
    async def claim(self, owners: Sequence[str], name: str, amount: int = 1) -> AsyncIterator[None]:
        """Holds room for a thing within the block, in which it gets its record. What has its room already, needs none.

        Args:
            owners: each must have room; those without a limit have.
            name: resource name of the thing.
            amount: how much it takes in all.

        Raises:
            QuotaExceeded: an owner has no room.
            Aborted, StateUnavailable: NATS does not keep the claim.
        """
        held: list[str] = []
        try:
            for owner in owners:
                if await self._take(owner, name, amount):
                    held.append(owner)
            yield
        finally:
            for owner in held:
                with contextlib.suppress(CodegraftError):  # it ends by itself
                    await asyncio.shield(self._give_back(owner, name))

    async def used(self, owner: str) -> int:
        """How much an owner takes, by its records."""
        return sum((await self._used(owner)).values())

    async def check(self, owner: str) -> None:
        """Raises QuotaExceeded when an owner has no room at all: for what will only know later how much it takes."""
        if (room := await self.room(owner, "")) is not None:
            room.check(1)

    async def room(self, owner: str, name: str) -> Room | None:
        """What one thing may take in all, without claiming it; None without a limit."""
        limit = self._quotas.limit(self._kind, owner)
        if limit is None:
            return None
        taken = sum(amount for other, amount in (await self._used(owner)).items() if other != name)
        return Room(self._kind, owner, limit, taken, await self._retry(owner))

    async def _take(self, owner: str, name: str, amount: int) -> bool:
        """Whether a claim was needed."""
        for attempt in range(_TRIES):
            limit = self._quotas.limit(self._kind, owner)
            if limit is None:
                return False
            places, revision = await self._read(owner)  # before the count: who came in between has moved it on
            used = await self._used(owner)
            if amount <= used.get(name, 0):
                return False
            taken = sum(({place.name: place.amount for place in places} | dict(used) | {name: 0}).values())
            if taken + amount > limit:
                raise refuse(self._kind, owner, limit, taken, amount, await self._retry(owner))
            mine = StoredPlace(name=name, amount=amount)
            mine.expire_time.FromNanoseconds(time.time_ns() + round(self._lasts.total_seconds() * 1e9))
            if await self._write(owner, [*(place for place in places if place.name != name), mine], revision):
                return True
            await asyncio.sleep(_WAITS.delay(attempt))
        raise Aborted(f"too many calls want room of {owner} at once", hint="Try again.", retry_after=1.0)

    async def _give_back(self, owner: str, name: str) -> None:
        for attempt in range(_TRIES):
            places, revision = await self._read(owner)
            kept = [place for place in places if place.name != name]
            if len(kept) == len(places) or await self._write(owner, kept, revision):
                return
            await asyncio.sleep(_WAITS.delay(attempt))

    async def _read(self, owner: str) -> tuple[list[StoredPlace], int | None]:
        """The claims that count still, and the record's revision."""
        entry = await self._state.get(self._key(owner))
        if entry is None:
            return [], None
        now = time.time_ns()
        places = StoredPlaces.FromString(entry.value or b"").places
        return [place for place in places if place.expire_time.ToNanoseconds() > now], entry.revision

    async def _write(self, owner: str, places: Sequence[StoredPlace], revision: int | None) -> bool:
        """Whether nobody was faster."""
        value = StoredPlaces(places=places).SerializeToString()
        try:
            if revision is None:
                await self._state.create(self._key(owner), value)
            else:
                await self._state.update(self._key(owner), value, revision)
        except (ResourceExists, RevisionMismatch):
            return False
        return True

    def _key(self, owner: str) -> str:
        # The subject of a token may be anything; keys of the bucket may not.
        plain = owner if owner.startswith(("projects/", "keys/")) else f"subjects/{owner.encode().hex()}"
        return f"StoredPlaces/{plain}/{self._kind}"
