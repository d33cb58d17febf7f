"""A job queue on JetStream: the work-queue stream JOBS, one durable pull consumer per kind, the stream JOBS_DEAD.

Each job has a subject of its own that holds at most one message. So the server itself refuses to queue a job twice, and
takes it again as soon as its message is gone: no ids to remember, no window of time.

The server redelivers without a bound. The bound is the job's own count of attempts, which survives a lost queue; a
message that the server stopped delivering would stay, and block its subject for ever.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import timedelta

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import api
from nats.js.client import JetStreamContext

from services.core import errors
from services.core.jobs.queue import ACK_WAIT
from services.core.nats_connection import NatsConnection, translated
from services.core.state.nats import decode, encode
from services.core.telemetry import tracing

STREAM = "JOBS"
DEAD_STREAM = "JOBS_DEAD"
DEAD_KEPT = timedelta(days=30)
FETCH_SECONDS = 5.0
"""A fetch that was under way when the server restarted lasts to its end, so it must be short."""
_SUBJECT_FULL = 10077
"""JetStream's error code for a subject that holds its maximum of messages."""


def durable(kind: str) -> str:
    """Name of the consumer of that kind of jobs; deployments scale workers by it."""
    return f"workers-{kind}"


class NatsQueue:
    """See :class:`~services.core.jobs.queue.JobQueue`. Streams and consumers are made at their first use.

    Args:
        ack_wait: the same in every process that takes jobs of a kind.
    """

    def __init__(self, connection: NatsConnection, *, ack_wait: timedelta = ACK_WAIT) -> None:
        self._connection = connection
        self._ack_wait = ack_wait
        self._ready = False
        self._consumers: set[str] = set()
        self._subscriptions: dict[str, JetStreamContext.PullSubscription] = {}

    async def submit(self, kind: str, name: str) -> None:
        try:
            await self._ensure()
            # Where there is no worker, and so nobody else has made it: what scales workers from none looks at its lag.
            await self._ensure_consumer(kind)
            with translated(f"queue {name}"):
                trace = tracing.traceparent()
                headers = {tracing.HEADER: trace} if trace else None
                await self._connection.js.publish(f"jobs.{kind}.{encode(name)}", name.encode(), headers=headers)
        except errors.StateUnavailable as error:
            if isinstance(error.__cause__, nats.js.errors.APIError) and error.__cause__.err_code == _SUBJECT_FULL:
                return
            self._ready = False  # the stream may be gone: the next use makes it anew
            raise

    async def take(self, kind: str, timeout: float) -> NatsDelivery | None:  # noqa: ASYNC109
        subscription = self._subscriptions.get(kind)
        msg: Msg | None = None
        try:
            if subscription is None:
                subscription = self._subscriptions[kind] = await self._bind(kind)
            with translated(f"take a {kind} job"):
                try:
                    [msg] = await subscription.fetch(1, timeout=min(timeout, FETCH_SECONDS))
                except nats.errors.TimeoutError:
                    return None
        except BaseException:
            # The request may still be waiting at the server: without a listener it is dropped there, and no job is
            # handed to nobody.
            await self._leave(kind, msg)
            raise
        return NatsDelivery(self._connection, kind, msg)

    async def _bind(self, kind: str) -> JetStreamContext.PullSubscription:
        await self._ensure()
        await self._ensure_consumer(kind)
        with translated(f"take {kind} jobs"):
            return await self._connection.js.pull_subscribe_bind(durable(kind), STREAM)

    async def _ensure_consumer(self, kind: str) -> None:
        if kind in self._consumers:
            return
        config = api.ConsumerConfig(
            durable_name=durable(kind),
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=self._ack_wait.total_seconds(),
            max_deliver=-1,
            max_ack_pending=10_000,
            filter_subject=f"jobs.{kind}.>",
        )
        with translated(f"take {kind} jobs"):
            await self._connection.js.add_consumer(STREAM, config)
        self._consumers.add(kind)

    async def _leave(self, kind: str, msg: Msg | None) -> None:
        self._ready = False
        subscription = self._subscriptions.pop(kind, None)
        with contextlib.suppress(nats.errors.Error, OSError):
            if msg is not None:
                await msg.nak()
            if subscription is not None:
                await subscription.unsubscribe()

    async def _ensure(self) -> None:
        if self._ready:
            return
        self._consumers.clear()  # what was lost with the stream
        for config in stream_configs():
            await self._connection.ensure_stream(config)
        self._ready = True


def stream_configs() -> list[api.StreamConfig]:
    """How the two streams are made."""
    return [
        api.StreamConfig(
            name=STREAM,
            subjects=["jobs.>"],
            retention=api.RetentionPolicy.WORK_QUEUE,
            storage=api.StorageType.FILE,
            max_msgs_per_subject=1,
            discard=api.DiscardPolicy.NEW,
            discard_new_per_subject=True,
        ),
        api.StreamConfig(
            name=DEAD_STREAM,
            subjects=["dead.>"],
            retention=api.RetentionPolicy.LIMITS,
            storage=api.StorageType.FILE,
            max_age=DEAD_KEPT.total_seconds(),
        ),
    ]


@dataclass
class NatsDelivery:
    """See :class:`~services.core.jobs.queue.Delivery`."""

    _connection: NatsConnection
    _kind: str
    _msg: Msg

    @property
    def name(self) -> str:
        return decode(self._msg.subject.split(".", 2)[2])

    @property
    def traceparent(self) -> str:
        return (self._msg.headers or {}).get(tracing.HEADER, "")

    @property
    def attempt(self) -> int:
        return self._msg.metadata.num_delivered

    async def ack(self) -> None:
        with translated(f"acknowledge {self.name}"):
            await self._msg.ack_sync(timeout=FETCH_SECONDS)

    async def nak(self, delay: float = 0) -> None:
        with translated(f"give back {self.name}"):
            await self._msg.nak(delay)

    async def in_progress(self) -> None:
        with translated(f"keep {self.name}"):
            await self._msg.in_progress()

    async def dead_letter(self, why: str) -> None:
        headers = {
            # One dead letter for one message, however often this is repeated.
            api.Header.MSG_ID: f"{STREAM}:{self._msg.metadata.sequence.stream}",
            "Codegraft-Reason": " ".join(why.split())[:1000].encode("ascii", "replace").decode(),
        }
        with translated(f"bury {self.name}"):
            await self._connection.js.publish(
                f"dead.{self._kind}.{encode(self.name)}", self.name.encode(), headers=headers
            )
        await self.ack()
