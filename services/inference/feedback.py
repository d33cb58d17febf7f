"""What became of completions in editors: counts per version, durable in JetStream KV. Nothing of the code is in them.

A completion's id says when it was made and by which version, so its events always belong to the same record, which
holds the counts of one hour and what is in them already. Counting is one compare-and-set on that record: an event
counts once, however often and at however many replicas it arrives.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta

from codegraft.inference.v1.feedback_pb2 import (
    FEEDBACK_EVENT_ACCEPTED,
    FEEDBACK_EVENT_EDITED,
    FEEDBACK_EVENT_REJECTED,
    FEEDBACK_EVENT_SHOWN,
    AdapterAcceptance,
    FeedbackEvent,
    FeedbackHour,
)
from services.core.errors import InvalidArgument, NotFound, ResourceExhausted, ResourceExists
from services.core.state import Table
from services.inference.completion_id import CompletionId

DEFAULT_WINDOW, LONGEST_WINDOW = timedelta(days=7), timedelta(days=90)
MOST_CHARACTERS = 1_000_000
_HOUR = 3600
_PARTS = 4
"""Records of one hour: writers of a large company meet less often."""
_MOST_SEEN = 100_000
"""Events of one record, 8 bytes each: a value in KV has at most 1 MiB."""
_MOST_VERSIONS = 500
"""Versions in one record; more are no versions but somebody's inventions."""
_Z = 1.959964
"""Of the normal distribution, for 95 %."""
_BEFORE: dict[FeedbackEvent, tuple[FeedbackEvent, ...]] = {
    FEEDBACK_EVENT_SHOWN: (),
    FEEDBACK_EVENT_ACCEPTED: (FEEDBACK_EVENT_SHOWN,),
    FEEDBACK_EVENT_REJECTED: (FEEDBACK_EVENT_SHOWN,),
    FEEDBACK_EVENT_EDITED: (FEEDBACK_EVENT_SHOWN, FEEDBACK_EVENT_ACCEPTED),
}
"""What must have happened before an event: counted with it when nobody told of it."""


class Feedback:
    """The feedback of all projects, shared by all replicas."""

    def __init__(self, table: Table[FeedbackHour]) -> None:
        self._table = table

    async def record(
        self, project: str, completion: CompletionId, event: FeedbackEvent, characters: int
    ) -> Sequence[FeedbackEvent]:
        """Counts an event, and those that must have happened before it; returns what is news, which is nothing when
        it was counted before.

        Raises:
            InvalidArgument: no such event, or characters that cannot be.
            ResourceExhausted: more feedback came on this hour than any editors give.
            Aborted: too many writers at once.
        """
        if event not in _BEFORE:
            raise InvalidArgument("event is not set", field="event", hint="Use SHOWN, ACCEPTED, REJECTED or EDITED.")
        if not 0 <= characters <= MOST_CHARACTERS:
            raise InvalidArgument(
                f"characters is {characters}", field="characters", hint=f"Use 0 to {MOST_CHARACTERS:,}."
            )
        hour, part = int(completion.time) // _HOUR, _digest(completion.text) % _PARTS
        name, news = f"{project}/feedback/{hour}-{part}", list[FeedbackEvent]()

        def change(record: FeedbackHour) -> None:
            news[:] = _count(record, completion, event, characters)

        if await self._table.find(name) is None:
            record = FeedbackHour(name=name)
            record.create_time.GetCurrentTime()
            change(record)
            try:
                await self._table.create(record)
            except ResourceExists:
                pass  # another writer was faster: count in its record
            else:
                await self._forget(project)
                return news
        await self._table.mutate(name, change)
        return news

    async def acceptance(self, project: str, since: float) -> list[AdapterAcceptance]:
        """Counts of the completions made from the hour of a moment on, per version, the most shown first.

        Args:
            since: seconds since 1970.
        """
        records = await self._table.all(f"{project}/feedback/")
        first = int(since) // _HOUR
        return _totals(entry for record in records if _hour(record) >= first for entry in record.adapters)

    async def forget(self, project: str, before: float) -> None:
        """Removes a project's counts from before a moment, in seconds since 1970."""
        for record in await self._table.all(f"{project}/feedback/"):
            # Earlier releases did not note the time.
            known = (
                record.create_time.ToNanoseconds() / 1e9 if record.HasField("create_time") else _hour(record) * _HOUR
            )
            if known < before:
                with contextlib.suppress(NotFound):  # another replica was faster
                    await self._table.delete(record.name)

    async def _forget(self, project: str) -> None:
        """Removes what no window reaches any more. Called for the first event of an hour."""
        oldest = int(time.time() - LONGEST_WINDOW.total_seconds()) // _HOUR
        for record in await self._table.all(f"{project}/feedback/"):
            if _hour(record) < oldest:
                with contextlib.suppress(NotFound):  # another replica was faster
                    await self._table.delete(record.name)


def _count(
    record: FeedbackHour, completion: CompletionId, event: FeedbackEvent, characters: int
) -> list[FeedbackEvent]:
    """Counts into a record what is not in it yet, and returns that."""
    seen = set(record.seen)
    if _digest(completion.text, event) in seen:
        return []
    version = completion.adapter_sha256
    entry = next((entry for entry in record.adapters if entry.adapter_sha256 == version), None)
    if len(seen) >= _MOST_SEEN or (entry is None and len(record.adapters) >= _MOST_VERSIONS):
        raise ResourceExhausted("more feedback came on this hour than is counted", hint="It need not be sent again.")
    if entry is None:
        entry = record.adapters.add(adapter_sha256=version)
    news = [each for each in (*_BEFORE[event], event) if _digest(completion.text, each) not in seen]
    for each in news:
        record.seen.append(_digest(completion.text, each))
        counter = FeedbackEvent.Name(each).removeprefix("FEEDBACK_EVENT_").lower()
        setattr(entry, counter, getattr(entry, counter) + 1)
    if event == FEEDBACK_EVENT_ACCEPTED:
        entry.accepted_characters += characters
    if event == FEEDBACK_EVENT_EDITED:
        entry.edited_characters += characters
    return news


def _totals(entries: Iterable[AdapterAcceptance]) -> list[AdapterAcceptance]:
    totals: dict[str, AdapterAcceptance] = {}
    for entry in entries:
        total = totals.setdefault(entry.adapter_sha256, AdapterAcceptance(adapter_sha256=entry.adapter_sha256))
        for name in ("shown", "accepted", "rejected", "edited", "accepted_characters", "edited_characters"):
            setattr(total, name, getattr(total, name) + getattr(entry, name))
    for total in totals.values():
        total.rate = total.accepted / total.shown
        total.rate_low, total.rate_high = wilson(total.accepted, total.shown)
    return sorted(totals.values(), key=lambda total: (-total.shown, total.adapter_sha256))


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share, after Wilson (1927): honest for few trials and for shares near 0 and 1, too."""
    share, z2 = successes / trials, _Z * _Z
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def _hour(record: FeedbackHour) -> int:
    """Hours since 1970."""
    return int(record.name.rpartition("/")[2].partition("-")[0])


def _digest(*parts: object) -> int:
    """64 bits of a hash."""
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest())
