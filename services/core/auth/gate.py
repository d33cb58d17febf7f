"""The gate that every call goes through: who is it, and may it do this. Nothing of a service runs before."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from services.core import log
from services.core.auth import policy
from services.core.auth.caller import ANYBODY, Caller
from services.core.auth.jwt import Tokens
from services.core.auth.keyring import Keyring
from services.core.auth.keys import PREFIX
from services.core.config import CoreSettings
from services.core.errors import InvalidArgument, KeyExpired, PermissionDenied, Unauthenticated
from services.core.rpc.client import AUTHORIZATION
from services.core.state import StateStore

logger = log.get(__name__)


class Gate:
    """Lets calls in. Make it with :meth:`of`; :meth:`run` keeps it up to date.

    Args:
        keyring: None lets everybody do everything.
        tokens: None where no OIDC issuer is set.
    """

    def __init__(self, keyring: Keyring | None, tokens: Tokens | None = None) -> None:
        self._keyring = keyring
        self._tokens = tokens

    @classmethod
    def of(cls, settings: CoreSettings, keys: StateStore | None) -> Gate:
        """The gate that the settings ask for.

        Args:
            keys: the bucket of the keys.

        Raises:
            InvalidArgument: authentication is off, and others than this machine could call; or it is on, and there are
                no keys to check with.
        """
        if settings.auth == "off":
            if not settings.listens_on_loopback:
                raise InvalidArgument(
                    f"authentication is off, and {settings.listen} can be reached from other machines",
                    field="CODEGRAFT_AUTH",
                    hint="Set CODEGRAFT_AUTH=on, or listen on 127.0.0.1.",
                )
            logger.warning("authentication is off: every process of this machine may do everything")
            return cls(None)
        if keys is None:
            raise InvalidArgument(
                "authentication is on, and there is no bucket of keys", field="CODEGRAFT_AUTH", hint="This is a defect."
            )
        if not settings.listens_on_loopback and settings.tls_cert_file is None:
            logger.warning("keys come in clear text: set CODEGRAFT_TLS_CERT_FILE and CODEGRAFT_TLS_KEY_FILE")
        return cls(Keyring(keys), Tokens.of(settings))

    async def run(self) -> None:
        """Follows the keys until cancelled."""
        if self._keyring is not None:
            await self._keyring.run()

    async def identify(self, method: str, metadata: Mapping[str, Any]) -> Caller:
        """Who calls.

        Raises:
            Unauthenticated, KeyExpired, KeyRevoked, InvalidToken: nobody that is known.
            StateUnavailable: the keys were not read yet, or the token's issuer does not answer.
        """
        if self._keyring is None or policy.rule_of(method) == policy.PUBLIC:
            return ANYBODY
        kind, _, credentials = str(metadata.get(AUTHORIZATION, "")).partition(" ")
        credentials = credentials.strip()
        if kind.lower() != "bearer" or not credentials:
            raise Unauthenticated(
                "the call has no credentials",
                field=AUTHORIZATION,
                hint="Send the metadata 'authorization: Bearer' with an API key; see `codegraft key create`.",
            )
        if credentials.startswith(PREFIX) or self._tokens is None:
            return await self._keyring.caller(credentials)
        return await self._tokens.caller(credentials)

    async def admit(
        self, caller: Caller, method: str, request: Any, seen: Callable[[Any], object] = lambda first: None
    ) -> Any:
        """The request, or stream of requests, when the caller may make it.

        Args:
            seen: told the request, of a stream the first one, before it is checked.

        Raises:
            PermissionDenied: it may not. Of a stream every message with a header is looked at, the first one now.
        """
        if not hasattr(request, "__aiter__"):
            seen(request)
            self._check(caller, method, request)
            return request
        messages = aiter(request)
        first = await anext(messages, None)
        if first is not None:  # the handler says what is wrong with an empty stream
            seen(first)
            self._check(caller, method, first)
        return self._checked(caller, method, first, messages)

    def _check(self, caller: Caller, method: str, request: Any) -> None:
        if self._keyring is not None:
            policy.check(caller, method, request)

    async def _checked(
        self, caller: Caller, method: str, first: Any, messages: AsyncIterator[Any]
    ) -> AsyncIterator[Any]:
        """The stream, whose first message was looked at already."""
        if first is None:
            return
        yield first
        async for message in messages:
            if (
                self._keyring is not None
                and "header" in message.DESCRIPTOR.fields_by_name
                and message.HasField("header")
            ):
                policy.check(caller, method, message)
            yield message

    @contextlib.contextmanager
    def holding(self, caller: Caller, end: Callable[[], object]) -> Iterator[None]:
        """For the length of a stream: calls ``end`` once the caller's key or token is not good any more."""
        with contextlib.ExitStack() as stack:
            if caller.digest and self._keyring is not None:
                stack.callback(self._keyring.hold(caller, end))
            if caller.expires is not None:
                left = max(0.0, caller.expires - time.time())
                # Later than a month is later than any connection lives, and call_later's clock has its limits.
                timer = asyncio.get_running_loop().call_later(min(left, 30 * 86400), end)
                stack.callback(timer.cancel)
            yield

    def why_ended(self, caller: Caller) -> Unauthenticated | PermissionDenied | None:
        """Why the caller's credentials are not good any more; None while they are."""
        if caller.expires is not None and caller.expires <= time.time():
            return KeyExpired(f"what {caller.subject} authenticated with has expired", hint="Use a new one.")
        if caller.digest and self._keyring is not None:
            return self._keyring.why_ended(caller)
        return None
