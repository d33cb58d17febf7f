"""Reading a stream in order: one short-lived push consumer that either delivers without a gap or says that it broke.

The client library's own ordered consumer repairs itself behind its user's back and leaks consumers over
reconnections; here a reader that was interrupted is thrown away, and who reads starts a new one after the last
sequence it has seen.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from datetime import UTC, datetime
from types import TracebackType

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import api

from services.core.nats_connection import NatsConnection, translated

HEARTBEAT = 5.0
"""Seconds between the server's heartbeats while nothing happens; silence for twice as long is an interruption."""
_LAST_CONSUMER_SEQUENCE = "Nats-Last-Consumer"
_STALLED = "Nats-Consumer-Stalled"


class Interrupted(Exception):
    """The reader may have missed messages: start a new one after the last sequence seen."""


class OrderedReader:
    """Messages of a stream in stream order, each once. An async context manager; one reader, one task.

    Entering and :meth:`next` raise StateUnavailable when the server does not answer.

    Args:
        filters: subjects, all of them when empty.
        after: start behind this stream sequence; None starts with the newest message of each subject.
        since: start with the first message of that time or later, in place of ``after``.
        headers_only: messages come without their data.
    """

    def __init__(
        self,
        connection: NatsConnection,
        stream: str,
        filters: Sequence[str],
        *,
        after: int | None = None,
        since: datetime | None = None,
        headers_only: bool = False,
    ) -> None:
        self._connection = connection
        self._stream = stream
        self._filters = list(filters)
        self._after = after
        self._since = since
        self._headers_only = headers_only
        self._queue: asyncio.Queue[Msg | None] = asyncio.Queue()
        self._subscription: Subscription | None = None
        self._consumer = ""
        self._delivered = 0
        self.backlog = 0
        """Messages that were waiting when the reader started."""

    async def __aenter__(self) -> OrderedReader:
        inbox = self._connection.client.new_inbox()
        self._connection.on_reconnect.add(self._interrupt)
        try:
            # Limits off: the server stops by itself (flow control) until we answer what it has sent.
            with translated(f"read stream {self._stream}"):
                self._subscription = await self._connection.client.subscribe(
                    inbox, cb=self._queue.put, pending_msgs_limit=0, pending_bytes_limit=0
                )
                info = await self._connection.js.add_consumer(self._stream, self._config(inbox))
                self._consumer = info.name
        except BaseException:
            await self._close()
            raise
        self.backlog = (info.num_pending or 0) + (info.delivered.consumer_seq if info.delivered else 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    async def next(self) -> Msg | None:
        """The next message; None at a heartbeat, which comes when there was none for :data:`HEARTBEAT` seconds.

        Raises:
            Interrupted: heartbeats stopped, a message is missing, or the connection was lost meanwhile.
        """
        try:
            async with asyncio.timeout(2 * HEARTBEAT):
                msg = await self._queue.get()
        except TimeoutError:
            raise Interrupted("no heartbeat") from None
        if msg is None:
            raise Interrupted("reconnected")
        headers = msg.headers or {}
        if headers.get(api.Header.STATUS) == api.StatusCode.CONTROL_MESSAGE:
            await self._control(msg, headers)
            return None
        if headers.get(api.Header.STATUS):
            raise Interrupted(headers.get(api.Header.DESCRIPTION, "consumer gone"))
        self._delivered += 1
        if msg.metadata.sequence.consumer != self._delivered:
            raise Interrupted("a message is missing")
        return msg

    async def _control(self, msg: Msg, headers: dict[str, str]) -> None:
        if int(headers.get(_LAST_CONSUMER_SEQUENCE, self._delivered)) != self._delivered:
            raise Interrupted("a message is missing")
        if reply := msg.reply or headers.get(_STALLED):
            with translated(f"read stream {self._stream}"):
                await self._connection.client.publish(reply)

    def _interrupt(self) -> None:
        self._queue.put_nowait(None)

    def _config(self, inbox: str) -> api.ConsumerConfig:
        config = api.ConsumerConfig(
            deliver_subject=inbox,
            ack_policy=api.AckPolicy.NONE,
            max_deliver=1,
            flow_control=True,
            idle_heartbeat=HEARTBEAT,
            inactive_threshold=6 * HEARTBEAT,
            mem_storage=True,
            num_replicas=1,
            headers_only=self._headers_only or None,
        )
        if self._filters:
            config.filter_subjects = self._filters
        if self._since is not None:
            config.deliver_policy = api.DeliverPolicy.BY_START_TIME
            config.opt_start_time = self._since.astimezone(UTC).isoformat()  # type: ignore[assignment]
        elif self._after is None:
            config.deliver_policy = api.DeliverPolicy.LAST_PER_SUBJECT
            config.filter_subjects = self._filters or [">"]
        else:
            config.deliver_policy = api.DeliverPolicy.BY_START_SEQUENCE
            config.opt_start_seq = self._after + 1
        return config

    async def _close(self) -> None:
        self._connection.on_reconnect.discard(self._interrupt)
        client = self._connection.client
        with contextlib.suppress(nats.errors.Error, OSError):
            if self._subscription is not None:
                await self._subscription.unsubscribe()
            if self._consumer and client.is_connected:
                # Not awaited: the server forgets the consumer anyway once nobody listens.
                forget = f"$JS.API.CONSUMER.DELETE.{self._stream}.{self._consumer}"
                await client.publish(forget, reply=client.new_inbox())
