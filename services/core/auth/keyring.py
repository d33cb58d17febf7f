"""The keys that a service knows: a copy in memory of what ingest keeps in JetStream KV, followed by a watch.

A call costs no request to NATS. While NATS is away the known keys keep working, and a revocation arrives when it is
back; a key that was made meanwhile is refused until then.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf.timestamp_pb2 import Timestamp

from codegraft.access.v1.access_pb2 import StoredKey
from services.core import log
from services.core.auth.caller import Caller, Role
from services.core.auth.keys import ApiKey
from services.core.backoff import Backoff
from services.core.errors import KeyExpired, KeyRevoked, PermissionDenied, StateUnavailable, Unauthenticated
from services.core.state import Entry, StateStore

BUCKET = "access"
"""JetStream KV bucket of the keys; ingest alone writes to it."""
PREFIX = "StoredKey/"
"""Where services.core.state.Table puts them."""
SETTINGS = "settings"
"""Creator of the keys that the settings of ingest give."""
_PATIENCE = 1.0
"""Seconds that a call with an unknown key waits for news: it may have been made a moment ago. No read at NATS instead:
calls with invented keys would then reach NATS."""
_LOADING = 5.0
"""Seconds that a call waits for the first copy of the keys."""

_LONGEST = 30 * 86400.0
"""Seconds. Later than a month is later than any connection lives, and the loop's clock has its limits."""

logger = log.get(__name__)


@dataclass(frozen=True, slots=True)
class KnownKey:
    """What is known of one key."""

    name: str
    role: Role
    projects: frozenset[str] | None
    revoked: bool
    expires: float | None
    """Seconds since 1970."""
    secrets: tuple[tuple[bytes, float | None], ...]
    """(SHA-256, when it ends)."""
    is_service: bool = False
    """Of the settings, and no operator's."""

    @classmethod
    def of(cls, value: bytes) -> KnownKey:
        """Of the stored record.

        Raises:
            ValueError: it has a role that this release does not know.
        """
        stored = StoredKey.FromString(value)
        key = stored.key
        return cls(
            name=key.name,
            role=Role(key.role),
            projects=None if key.all_projects else frozenset(key.projects),
            revoked=key.HasField("revoke_time"),
            expires=_seconds(key.expire_time) if key.HasField("expire_time") else None,
            secrets=tuple(
                (each.sha256, _seconds(each.expire_time) if each.HasField("expire_time") else None)
                for each in stored.secrets
            ),
            is_service=key.creator == SETTINGS and key.role < Role.OPERATOR,
        )

    def caller(self, digest: bytes, now: float) -> Caller:
        """Who comes with a secret of this digest.

        Raises:
            Unauthenticated: it is none of the key's.
            KeyRevoked, KeyExpired: it was one.
        """
        found = [ends for sha256, ends in self.secrets if hmac.compare_digest(sha256, digest)]
        if not found:
            raise _unknown()
        # Only who has the secret learns more than that.
        if self.revoked:
            raise KeyRevoked(f"{self.name} was revoked", hint="Ask an operator for another key.")
        ends = min((each for each in (found[0], self.expires) if each is not None), default=None)
        if ends is not None and ends <= now:
            what = "" if ends == self.expires else "this secret of "
            raise KeyExpired(f"{what}{self.name} has expired", hint="Ask an operator for a new secret or another key.")
        return Caller(self.name, self.role, self.projects, ends, self.is_service, digest)


@dataclass(eq=False, slots=True)
class _Held:
    """What lasts only as long as its caller's key is good."""

    caller: Caller
    end: Callable[[], object]
    timer: asyncio.TimerHandle | None = None


class Keyring:
    """See the module's docstring. Belongs to one event loop; :meth:`run` keeps it up to date.

    Args:
        store: the bucket :data:`BUCKET`.
    """

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._keys: dict[str, KnownKey] = {}
        self._loaded = asyncio.Event()
        self._news = asyncio.Event()
        self._held: dict[str, set[_Held]] = {}

    async def run(self) -> None:
        """Follows the bucket until cancelled."""
        waits, failures = Backoff(), 0
        while True:
            try:
                for entry in await self._store.list(PREFIX):
                    self._take(entry)
                self._loaded.set()
                async for entry in self._store.watch(PREFIX):
                    failures = 0
                    self._take(entry)
            except StateUnavailable as error:
                logger.warning("the keys cannot be followed", error=error.message, known=len(self._keys))
            await asyncio.sleep(waits.delay(failures))
            failures += 1

    async def caller(self, text: str) -> Caller:
        """Who comes with this API key.

        Raises:
            Unauthenticated: no such key; KeyRevoked and KeyExpired when it was one.
            StateUnavailable: the keys were not read yet.
        """
        key = ApiKey.parse(text)
        if key is None:
            raise _unknown()
        await self._load()
        if key.name not in self._keys:
            await self._wait_for(key.name)
        known = self._keys.get(key.name)
        if known is None:
            raise _unknown()
        return known.caller(key.digest, time.time())

    def hold(self, caller: Caller, end: Callable[[], object]) -> Callable[[], None]:
        """Calls ``end`` once the caller's key is revoked, replaced, or of one of its projects no more; what it returns
        makes it forget that. That may have happened since the caller was let in: a stream waits for its first message
        as long as its caller likes."""
        mine = _Held(caller, end)
        self._held.setdefault(caller.subject, set()).add(mine)
        self._look_at(mine)

        def release() -> None:
            held = self._held.get(caller.subject, set())
            held.discard(mine)
            if not held:
                self._held.pop(caller.subject, None)
            if mine.timer is not None:
                mine.timer.cancel()

        return release

    def why_ended(self, caller: Caller) -> Unauthenticated | PermissionDenied | None:
        """Why the caller's key is not good any more for its projects; None while it is."""
        known = self._keys.get(caller.subject)
        if known is None:
            return KeyRevoked(f"{caller.subject} is gone", hint="Ask an operator for another key.")
        try:
            now = known.caller(caller.digest, time.time())
        except Unauthenticated as error:
            return error
        if not now.covers(caller.projects):
            gone = ", ".join(sorted((caller.projects or frozenset()) - (now.projects or frozenset())))
            return PermissionDenied(
                f"{caller.subject} may not use {gone} any more: it was deleted", hint="Use a key of that project."
            )
        return None

    async def _load(self) -> None:
        if self._loaded.is_set():
            return
        try:
            async with asyncio.timeout(_LOADING):
                await self._loaded.wait()
        except TimeoutError:
            raise StateUnavailable("the API keys have not been read yet", retry_after=1.0) from None

    async def _wait_for(self, name: str) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                while name not in self._keys:
                    await self._news.wait()
        except TimeoutError:
            return

    def _take(self, entry: Entry) -> None:
        name = entry.key.removeprefix(PREFIX)
        if entry.value is None:
            self._keys.pop(name, None)
        else:
            try:
                self._keys[name] = KnownKey.of(entry.value)
            except (ValueError, TypeError) as error:
                logger.error("a key cannot be read, and is refused", name=name, error=str(error))
                self._keys.pop(name, None)
        self._news.set()
        self._news = asyncio.Event()
        for held in list(self._held.get(name, ())):
            self._look_at(held)

    def _look_at(self, held: _Held) -> None:
        """Ends what is held, or sees that it ends with its secret: one that was replaced may work on for a while."""
        if self.why_ended(held.caller) is not None:
            held.end()
            return
        ends = self._keys[held.caller.subject].caller(held.caller.digest, time.time()).expires
        if held.timer is not None:
            held.timer.cancel()
        if ends is not None:
            wait = min(max(0.0, ends - time.time()), _LONGEST)
            held.timer = asyncio.get_running_loop().call_later(wait, held.end)


def _unknown() -> Unauthenticated:
    return Unauthenticated(
        "the API key is not known", hint="Check CODEGRAFT_API_KEY, or the authorization header that is sent."
    )


def _seconds(time: Timestamp) -> float:
    return time.ToNanoseconds() / 1e9
