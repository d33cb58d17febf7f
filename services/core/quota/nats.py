"""The exchange of usage over core NATS: nothing of it is kept, and each service speaks on a subject of its own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import nats.errors
from nats.aio.msg import Msg

from services.core.nats_connection import NatsConnection, translated
from services.core.quota.channel import Anew, Hear

PREFIX = "quota."


class NatsChannel:
    """See :class:`~services.core.quota.channel.Channel`.

    Args:
        service: whose name is the subject's end: a service may speak for itself only.
    """

    def __init__(self, connection: NatsConnection, service: str) -> None:
        self._connection = connection
        self._subject = f"{PREFIX}{service}"

    @property
    def connected(self) -> bool:
        return self._connection.client.is_connected

    async def send(self, message: bytes) -> None:
        with contextlib.suppress(nats.errors.Error, OSError):
            await self._connection.client.publish(self._subject, message)

    @contextlib.asynccontextmanager
    async def listen(self, hear: Hear, anew: Anew) -> AsyncIterator[None]:
        """The client subscribes again by itself after each reconnection.

        Raises:
            StateUnavailable: the connection is closed for good.
        """

        async def on_message(message: Msg) -> None:
            hear(message.data)

        with translated("follow the usage of quotas"):
            subscription = await self._connection.client.subscribe(f"{PREFIX}*", cb=on_message)
        self._connection.on_reconnect.add(anew)
        anew()
        try:
            yield
        finally:
            self._connection.on_reconnect.discard(anew)
            with contextlib.suppress(nats.errors.Error, OSError):
                await subscription.unsubscribe()
