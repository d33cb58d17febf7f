"""The quotas that a service knows: a copy in memory of what ingest keeps in JetStream KV, followed by a watch.

As with keys, a call costs no request to NATS, and while NATS is away the known limits go on counting, those of rates
for each process alone. Before the first copy is there, the defaults of the settings do.
"""

from __future__ import annotations

import asyncio

from codegraft.access.v1.quota_pb2 import Quota
from services.core import log, names
from services.core.auth import policy
from services.core.auth.caller import ANYBODY, Caller
from services.core.backoff import Backoff
from services.core.errors import NotFound, StateUnavailable
from services.core.quota.channel import Channel
from services.core.quota.exchange import Exchange
from services.core.quota.limits import NONE, Defaults, Kind, Limits, effective, of_message
from services.core.quota.rates import Rates
from services.core.state import StateStore, Table

_UNCOUNTED = ("/codegraft.access.", "/grpc.")
"""Services whose calls are no requests: whoever is over a limit can still see why, and lift it."""
logger = log.get(__name__)


def table(store: StateStore) -> Table[Quota]:
    """The records, in the bucket of the keys: what every service reads already and only ingest writes."""
    return Table(store, Quota, missing=NotFound)


class Quotas:
    """See the module's docstring. Belongs to one event loop; :meth:`run` keeps it up to date.

    Args:
        store: the bucket services.core.auth.keyring.BUCKET.
        project: limits of projects for which nothing is set.
        key: those of keys, and of OIDC subjects.
        channel: to the other processes; without one, rates are those of this process.

    Attributes:
        requests: calls that begin.
        tokens: of completions.
    """

    def __init__(
        self, store: StateStore, project: Defaults = NONE, key: Defaults = NONE, channel: Channel | None = None
    ) -> None:
        self._table = table(store)
        self._project, self._key = project, key
        self._set: dict[str, Limits] = {}
        self.requests = Rates(Kind.REQUESTS, self.limit)
        self.tokens = Rates(Kind.TOKENS, self.limit)
        rates = {Kind.REQUESTS: self.requests, Kind.TOKENS: self.tokens}
        self._exchange = Exchange(channel, rates) if channel is not None else None

    async def run(self) -> None:
        """Follows the bucket, and exchanges usage with the other processes, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            if self._exchange is not None:
                tasks.create_task(self._exchange.run())

    async def _follow(self) -> None:
        waits, failures = Backoff(), 0
        while True:
            try:
                async for change in self._table.follow():
                    failures = 0
                    owner = change.name.removesuffix("/quota")
                    if change.message is None:
                        self._set.pop(owner, None)
                    else:
                        self._set[owner] = of_message(change.message.limits)
            except StateUnavailable as error:
                logger.warning("the quotas cannot be followed", error=error.message, known=len(self._set))
            await asyncio.sleep(waits.delay(failures))
            failures += 1

    def defaults(self, owner: str) -> Defaults:
        """The limits of an owner for which nothing is set."""
        return self._project if owner.startswith("projects/") else self._key

    def limit(self, kind: Kind, owner: str) -> int | None:
        """What an owner may have; None is no limit."""
        own = self._set.get(owner, {}).get(kind)
        return self.defaults(owner).limit(kind) if own is None else None if own < 0 else own

    def limits(self, owner: str) -> dict[Kind, int | None]:
        """All that an owner may have."""
        return effective(self._set.get(owner, {}), self.defaults(owner))

    def count(self, caller: Caller, method: str, request: object) -> None:
        """Counts a call that begins.

        Args:
            request: of a stream the first one; None where none came.

        Raises:
            QuotaExceeded: its caller, or the project that it names first, has had its share.
        """
        if method.startswith(_UNCOUNTED) or method.rpartition("/")[2].startswith("Watch"):
            return
        named = policy.resources(method, request) if request is not None else []
        project = names.project_of(named[0]) if named and named[0].startswith("projects/") else ""
        self.requests.take(owners(caller, project))


def owners(caller: Caller, project: str) -> list[str]:
    """Whose quotas a call has to fit: the project's, if it names one, and the caller's; those of services none."""
    if caller.is_service:
        return []
    return [each for each in (project, caller.subject if caller is not ANYBODY else "") if each]
