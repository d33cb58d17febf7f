"""Places for what lasts (runs, scans, stored bytes), given by compare-and-set: two calls never get the last one.

What is used is counted in the records themselves, which cannot drift. Between the count and the new record lies a gap,
through which two calls at once, at two replicas even, would both slip: so whoever is let in first writes a claim into
one small record of its owner, under the revision that it had before the count. Of two only one write succeeds, and the
other counts again, the first one's claim with it. The claim goes once the thing has a record of its own, or soon after
its process is gone: while that lives, it says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from codegraft.access.v1.quota_pb2 import StoredPlace, StoredPlaces
from services.core import log
from services.core.backoff import Backoff
from services.core.errors import Aborted, CodegraftError, ResourceExists, RevisionMismatch
from services.core.quota.limits import Kind
from services.core.quota.quotas import Quotas
from services.core.quota.refusal import refuse
from services.core.state import StateStore

Used = Callable[[str, StoredPlaces], Awaitable[Mapping[str, int]]]
"""Of an owner: resource names, and how much each takes, counted after its claims were read."""
Settle = Callable[[str, StoredPlaces], Awaitable[None]]
"""Brings an owner's record up to what is there now, before it is written without a claim that has ended."""
_TRIES = 50
_WAITS = Backoff(first=timedelta(milliseconds=2), longest=timedelta(milliseconds=100))
logger = log.get(__name__)


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
        state: a bucket that all processes share which claim places of this kind.
        used: counts the records of an owner.
        lasts: a claim whose process died, or was stopped for so long, is void after this time.
        retry: when there may be room for an owner that has none.
        settle: None where the record holds nothing but claims.
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
        settle: Settle | None = None,
    ) -> None:
        self._quotas, self._kind, self._state = quotas, kind, state
        self._used, self._lasts, self._retry, self._settle = used, lasts, retry, settle

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
        held: dict[str, StoredPlace] = {}
        keeper = asyncio.create_task(self._keep(held))
        try:
            for owner in owners:
                if (place := await self._take(owner, name, amount)) is not None:
                    held[owner] = place
            yield
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
            for owner, place in held.items():
                with contextlib.suppress(CodegraftError):  # it ends by itself
                    await asyncio.shield(self.settle(owner, place.holder))

    async def used(self, owner: str) -> int:
        """How much an owner takes, by its records."""
        there, _ = await self._read(owner)
        return sum((await self._used(owner, there)).values())

    async def check(self, owner: str) -> None:
        """Raises QuotaExceeded when an owner has no room at all: for what will only know later how much it takes."""
        if (room := await self.room(owner, "")) is not None:
            room.check(1)

    async def room(self, owner: str, name: str) -> Room | None:
        """What one thing may take in all, without claiming it; None without a limit."""
        limit = self._quotas.limit(self._kind, owner)
        if limit is None:
            return None
        there, _ = await self._read(owner)
        taken = sum(amount for other, amount in (await self._used(owner, there)).items() if other != name)
        return Room(self._kind, owner, limit, taken, await self._retry(owner))

    async def settle(self, owner: str, holder: str = "") -> None:
        """Ends a claim, or only brings an owner's record up to what is there now.

        Raises:
            Aborted, StateUnavailable: NATS does not keep it.
        """
        for attempt in range(_TRIES):
            there, revision = await self._read(owner)
            after = _without(there, holder)
            if self._settle is not None:
                await self._settle(owner, after)
            if after == there or await self._write(owner, after, revision):
                return
            await asyncio.sleep(_WAITS.delay(attempt))
        raise _crowded(owner)

    async def owners(self) -> list[str]:
        """The projects that have a record."""
        keys = await self._state.keys("StoredPlaces/projects/")
        end = f"/{self._kind}"
        return [key.removeprefix("StoredPlaces/").removesuffix(end) for key in keys if key.endswith(end)]

    async def _take(self, owner: str, name: str, amount: int) -> StoredPlace | None:
        """The claim, where one was needed."""
        for attempt in range(_TRIES):
            limit = self._quotas.limit(self._kind, owner)
            if limit is None:
                return None
            there, revision = await self._read(owner)  # before the count: who came in between has moved it on
            used = await self._used(owner, there)
            mine = StoredPlace(name=name, amount=amount, holder=secrets.token_hex(8))
            mine.counted = min(amount, used.get(name, 0))
            if mine.counted == amount:
                return None
            taken = _taken(there.places, used, but=name)
            if taken + amount > limit:
                raise refuse(self._kind, owner, limit, taken, amount, await self._retry(owner))
            if await self._hold(owner, mine, there, revision):
                return mine
            await asyncio.sleep(_WAITS.delay(attempt))
        raise _crowded(owner)

    async def _keep(self, held: Mapping[str, StoredPlace]) -> None:
        """Moves the end of claims on until cancelled."""
        while True:
            await asyncio.sleep(self._lasts.total_seconds() / 4)
            for owner, place in list(held.items()):
                try:
                    await self._renew(owner, place)
                except CodegraftError as error:
                    logger.warning("a claim of room may end too soon", owner=owner, name=place.name, error=str(error))

    async def _renew(self, owner: str, place: StoredPlace) -> None:
        # One that was void, because its process had been stopped, is there again: its bytes come, and count.
        for attempt in range(_TRIES):
            there, revision = await self._read(owner)
            now = next((each for each in there.places if each.holder == place.holder), place)
            if await self._hold(owner, now, _without(there, place.holder), revision):
                return
            await asyncio.sleep(_WAITS.delay(attempt))
        raise _crowded(owner)

    async def _hold(self, owner: str, place: StoredPlace, there: StoredPlaces, revision: int | None) -> bool:
        """Writes a claim to what is there; whether nobody was faster."""
        place.expire_time.FromNanoseconds(time.time_ns() + round(self._lasts.total_seconds() * 1e9))
        there.places.append(place)
        return await self._write(owner, there, revision)

    async def _read(self, owner: str) -> tuple[StoredPlaces, int | None]:
        """The record with the claims that count still, and its revision."""
        entry = await self._state.get(self._key(owner))
        if entry is None:
            return StoredPlaces(), None
        now, there = time.time_ns(), StoredPlaces.FromString(entry.value or b"")
        places = [place for place in there.places if place.expire_time.ToNanoseconds() > now]
        del there.places[:]
        there.places.extend(places)
        return there, entry.revision

    async def _write(self, owner: str, there: StoredPlaces, revision: int | None) -> bool:
        """Whether nobody was faster."""
        value = there.SerializeToString()
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


def _taken(places: Sequence[StoredPlace], used: Mapping[str, int], but: str) -> int:
    """What all things take but one: those that are recorded, and of those on their way what is not counted yet."""
    coming: dict[str, int] = {}
    for place in places:
        more = max(0, place.amount - max(place.counted, used.get(place.name, 0)))
        coming[place.name] = max(more, coming.get(place.name, 0))
    return sum(used.values()) - used.get(but, 0) + sum(coming.values()) - coming.get(but, 0)


def _without(there: StoredPlaces, holder: str) -> StoredPlaces:
    """The record without a claim."""
    after = StoredPlaces()
    after.CopyFrom(there)
    del after.places[:]
    after.places.extend(place for place in there.places if place.holder != holder)
    return after


def _crowded(owner: str) -> Aborted:
    return Aborted(f"too many calls want room of {owner} at once", hint="Try again.", retry_after=1.0)
