"""What the processes of all services let in, told to each other, so that a rate holds over all of them together.

Each process says what it let in since it last spoke, at most every :data:`INTERVAL`, or at once where that is much of a
limit; the others take it from their buckets too. A bucket fills up by itself, so nothing has to be taken back when a
process dies. No clock is compared. A message that is lost is an overshoot of what it says, until that would have come
back anyway; one that comes late counts when it comes.

Who begins, or was cut off, says what its buckets lack and asks the others, which answer with theirs; the fuller one of
two gives way. Cut off, a process counts alone.

Gubernator's GLOBAL behaviour and Kong's sync_rate share counts in the same way, without and with a store between them.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping

from google.protobuf.message import DecodeError

from codegraft.access.v1.quota_pb2 import SharedAmount, SharedUsage
from services.core import log
from services.core.errors import StateUnavailable
from services.core.quota.channel import Channel
from services.core.quota.limits import Kind
from services.core.quota.rates import Rates
from services.core.telemetry import figures

INTERVAL = 0.25
"""Seconds, at most, until the others hear of what was let in."""
_SOONEST = 0.02
"""Seconds between two messages, at least: so many calls make no storm."""
_LARGEST = 2000
"""Amounts in one message: below 300 kB with the longest names, of NATS' 1 MiB."""
_UNHEARD = 20
"""Messages that did not come back, as all do, after which it is silent for a while: NATS does not let them through."""
_SILENT = 60.0
"""Seconds of that."""
_RECENT = 300.0
"""Seconds for which another process counts as one that is there."""
logger = log.get(__name__)


class Exchange:
    """Tells and hears the rates of one process. Belongs to one event loop.

    Args:
        rates: by what they limit.
    """

    def __init__(self, channel: Channel, rates: Mapping[Kind, Rates]) -> None:
        self._channel, self._rates = channel, rates
        self._me = secrets.token_hex(8)
        self._asks = self._answers = False
        self._unheard = 0
        self._silent_until = 0.0
        """On the loop's clock."""
        self._peers: dict[str, float] = {}
        """Other processes, and when something came from them, on the monotonic clock; the newest last."""
        self._alone = False
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Tells and hears until cancelled."""
        for rates in self._rates.values():
            rates.hurry = self._wake.set
        try:
            async with self._channel.listen(self.hear, self._anew):
                while True:
                    await self._speak()
                    await asyncio.sleep(_SOONEST)
                    await self._pause()
        except StateUnavailable as error:
            logger.error("what is used of quotas cannot be exchanged", error=error.message)
        finally:
            for rates in self._rates.values():
                rates.hurry = None
            self._peers.clear()
            self._tell_peers()

    def words(self) -> list[bytes]:
        """What there is to say now."""
        asks, all_of_it = self._asks, self._asks or self._answers
        self._asks = self._answers = False
        amounts = []
        for kind, rates in self._rates.items():
            amounts += [SharedAmount(owner=owner, quota=kind, taken=took) for owner, took in rates.untold().items()]
            if all_of_it:
                amounts += [
                    SharedAmount(owner=owner, quota=kind, left_seconds=left) for owner, left in rates.left().items()
                ]
        parts = [amounts[start : start + _LARGEST] for start in range(0, len(amounts), _LARGEST)]
        if asks and not parts:
            parts = [[]]
        return [
            SharedUsage(process=self._me, asks=asks and part is parts[0], amounts=part).SerializeToString()
            for part in parts
        ]

    def hear(self, message: bytes) -> None:
        """Takes a message of any process."""
        try:
            said = SharedUsage.FromString(message)
        except DecodeError:
            logger.warning("a message about quotas cannot be read", bytes=len(message))
            return
        if said.process == self._me:
            self._unheard = 0
            self._count_together()
            return
        self._peers.pop(said.process, None)
        self._peers[said.process] = time.monotonic()
        figures.QUOTA_MESSAGES.labels("received").inc()
        figures.QUOTA_HEARD.set_to_current_time()
        for amount in said.amounts:
            rates = self._rates.get(Kind(amount.quota)) if amount.quota in _KINDS else None
            if rates is not None and amount.taken:
                rates.others_took(amount.owner, amount.taken)
            if rates is not None and amount.left_seconds > 0:
                rates.not_before(amount.owner, amount.left_seconds)
        if said.asks:
            self._answers = True
            self._wake.set()

    async def _speak(self) -> None:
        now = asyncio.get_running_loop().time()
        self._tell_peers()
        if not self._channel.connected:
            self._count_alone("DISCONNECTED")
        if not self._channel.connected or now < self._silent_until:
            for rates in self._rates.values():
                rates.untold()  # forgotten: it is in the buckets, and told with them
            return
        if self._silent_until:
            self._anew()
        for word in self.words():
            self._unheard += 1
            await self._channel.send(word)
            figures.QUOTA_MESSAGES.labels("sent").inc()
        if self._unheard > _UNHEARD:
            self._silent_until = now + _SILENT
            self._count_alone("UNHEARD")
            logger.error(
                "other replicas do not hear what is used of quotas: each limits rates for itself",
                hint="The NATS user needs quota.<service> and quota.* (python -m services.cli.local.permissions).",
            )

    def _count_alone(self, reason: str) -> None:
        if not self._alone:
            self._alone = True
            figures.QUOTA_ALONE.set(1)
            figures.QUOTA_FALLBACKS.labels(reason).inc()

    def _count_together(self) -> None:
        """Its own words come back, so the others' do as well."""
        self._alone = False
        figures.QUOTA_ALONE.set(0)

    def _tell_peers(self) -> None:
        oldest = time.monotonic() - _RECENT
        while self._peers and (first := next(iter(self._peers))) and self._peers[first] < oldest:
            del self._peers[first]
        figures.QUOTA_PEERS.set(len(self._peers))

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(INTERVAL - _SOONEST):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    def _anew(self) -> None:
        self._asks, self._unheard, self._silent_until = True, 0, 0.0
        self._wake.set()


_KINDS = frozenset(Kind)
