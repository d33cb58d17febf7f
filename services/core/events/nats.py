"""An event bus on the JetStream stream EVENTS: CloudEvents in binary mode, the type as the subject."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, unquote

import nats.errors
from google.protobuf.message import Message
from nats.aio.msg import Msg
from nats.js import api
from nats.js.client import JetStreamContext
from opentelemetry.trace import SpanKind

from services.core import errors, log
from services.core.backoff import Backoff
from services.core.events.bus import PREFIX, Event, check_type
from services.core.nats_connection import NatsConnection, translated
from services.core.nats_reader import Interrupted, OrderedReader
from services.core.telemetry import figures, tracing

STREAM = "EVENTS"
KEPT = timedelta(days=7)
"""How long the server keeps an event; who was away longer learns the rest by reconciling."""
DUPLICATES = timedelta(minutes=10)
"""How long the server remembers ids to drop repeated publications."""
ACK_WAIT = timedelta(minutes=5)
"""An event that was not acknowledged for so long goes to another subscriber of the same durable name."""
_FETCH_SECONDS = 5.0
"""A fetch that was under way when the server restarted lasts to its end, so it must be short."""
_PRINTABLE = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"%')
"""What the CloudEvents binding leaves as it is in header values; all else is percent-encoded."""

logger = log.get(__name__)


class NatsBus:
    """See :class:`~services.core.events.bus.EventBus`. The stream is made at its first use.

    Args:
        source: names the publisher in every event ("codegraft/trainer").
    """

    def __init__(self, connection: NatsConnection, source: str) -> None:
        self._connection = connection
        self._source = source
        self._ready = False

    async def publish(self, type: str, subject: str, data: Message, *, id: str) -> None:
        attributes = {
            "specversion": "1.0",
            "id": id,
            "type": check_type(type),
            "source": self._source,
            "subject": subject,
            "time": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
            "datacontenttype": "application/protobuf",
            "dataschema": data.DESCRIPTOR.full_name,
            "requestid": log.request_id(),
        }
        await self._ensure()
        with tracing.span(f"publish {type}", SpanKind.PRODUCER, attributes={"codegraft.subject": subject}):
            attributes["traceparent"] = tracing.traceparent()
            await self._send(type, data, attributes)

    async def _send(self, type: str, data: Message, attributes: dict[str, str]) -> None:
        headers = {f"ce-{key}": quote(value, safe=_PRINTABLE) for key, value in attributes.items() if value}
        headers[api.Header.MSG_ID] = headers["ce-id"]
        try:
            with translated(f"publish {type}"):
                await self._connection.js.publish(type, data.SerializeToString(), headers=headers)
            figures.EVENTS.labels(type).inc()
        except errors.StateUnavailable:
            self._ready = False  # the stream may be gone: the next use makes it anew
            raise

    async def subscribe(self, *types: str, durable: str = "") -> AsyncIterator[Event]:
        wanted = [check_type(type) for type in types] or [PREFIX + ">"]
        messages = self._durable(wanted, durable) if durable else self._ephemeral(wanted)
        async with contextlib.aclosing(messages):
            async for msg in messages:
                if (event := _event(msg)) is not None:
                    yield event

    async def _ephemeral(self, wanted: list[str]) -> AsyncGenerator[Msg, None]:
        after: int | None = None
        failures = 0
        while True:
            try:
                await self._ensure()
                if after is None:
                    with translated("follow events"):
                        after = (await self._connection.js.stream_info(STREAM)).state.last_seq
                async with OrderedReader(self._connection, STREAM, wanted, after=after) as reader:
                    failures = 0
                    while True:
                        if (msg := await reader.next()) is not None:
                            after = msg.metadata.sequence.stream
                            yield msg
            except (Interrupted, errors.StateUnavailable) as error:
                await self._pause(error, failures)
                failures += 1

    async def _durable(self, wanted: list[str], durable: str) -> AsyncGenerator[Msg, None]:
        subscription: JetStreamContext.PullSubscription | None = None
        failures = 0
        try:
            while True:
                try:
                    if subscription is None:
                        subscription = await self._bind(wanted, durable)
                    msg = await _fetch(subscription, durable)
                    if msg is None:
                        continue
                    failures = 0
                    try:
                        yield msg
                    except GeneratorExit:
                        await _give_back(msg)
                        raise
                    with translated(f"follow events as {durable}"):
                        await msg.ack()
                except errors.StateUnavailable as error:
                    await _leave(subscription)
                    subscription = None
                    await self._pause(error, failures)
                    failures += 1
        finally:
            await _leave(subscription)

    async def _bind(self, wanted: list[str], durable: str) -> JetStreamContext.PullSubscription:
        await self._ensure()
        config = api.ConsumerConfig(
            durable_name=durable,
            deliver_policy=api.DeliverPolicy.ALL,
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=ACK_WAIT.total_seconds(),
            filter_subjects=wanted,
        )
        with translated(f"follow events as {durable}"):
            await self._connection.js.add_consumer(STREAM, config)
            return await self._connection.js.pull_subscribe_bind(durable, STREAM)

    async def _ensure(self) -> None:
        if not self._ready:
            await self._connection.ensure_stream(stream_config())
            self._ready = True

    async def _pause(self, error: Exception, failures: int) -> None:
        if self._connection.client.is_closed:
            raise errors.StateUnavailable("the connection to NATS is closed") from error
        self._ready = False
        logger.info("a subscription starts anew", why=str(error))
        await asyncio.sleep(Backoff().delay(failures))


def stream_config() -> api.StreamConfig:
    """How the stream is made."""
    return api.StreamConfig(
        name=STREAM,
        subjects=[PREFIX + ">"],
        retention=api.RetentionPolicy.LIMITS,
        storage=api.StorageType.FILE,
        max_age=KEPT.total_seconds(),
        duplicate_window=DUPLICATES.total_seconds(),
    )


async def _fetch(subscription: JetStreamContext.PullSubscription, durable: str) -> Msg | None:
    msg: Msg | None = None
    try:
        with translated(f"follow events as {durable}"):
            try:
                [msg] = await subscription.fetch(1, timeout=_FETCH_SECONDS)
            except nats.errors.TimeoutError:
                return None
    except asyncio.CancelledError:
        if msg is not None:
            await _give_back(msg)
        raise
    return msg


async def _give_back(msg: Msg) -> None:
    """Another subscriber of the name gets it now and not only after :data:`ACK_WAIT`."""
    with contextlib.suppress(nats.errors.Error, OSError):
        await msg.nak()


async def _leave(subscription: JetStreamContext.PullSubscription | None) -> None:
    if subscription is not None:
        with contextlib.suppress(nats.errors.Error, OSError):
            await subscription.unsubscribe()


def _event(msg: Msg) -> Event | None:
    """None for a message that is no CloudEvent of ours: nobody can do anything about it."""
    headers = {key.lower(): unquote(value) for key, value in (msg.headers or {}).items()}
    try:
        return Event(
            id=headers["ce-id"],
            type=headers["ce-type"],
            source=headers["ce-source"],
            subject=headers.get("ce-subject", ""),
            time=datetime.fromisoformat(headers["ce-time"]),
            data=msg.data,
            request_id=headers.get("ce-requestid", ""),
            traceparent=headers.get("ce-traceparent", ""),
        )
    except (KeyError, ValueError):
        logger.warning("a message on the event stream is no CloudEvent", subject=msg.subject)
        return None
