"""A state store on JetStream KV.

A key's slashes are dots on the wire, so that a prefix is a subject filter and the server sends only what lies under it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

import nats.js.errors
from nats.aio.msg import Msg
from nats.js import api
from nats.js.kv import KV_MARKER_REASON, KV_OP, KeyValue

from services.core import errors, log
from services.core.backoff import Backoff
from services.core.nats_connection import STREAM_EXISTS, NatsConnection, translated
from services.core.nats_reader import Interrupted, OrderedReader
from services.core.state.store import Bounds, Entry, check_key
from services.core.telemetry import tracing

RECONCILE_SECONDS = 120.0
"""A watch is begun anew this often, behind the last revision it saw, whether it seems healthy or not."""

_WRONG_REVISION = (10071, 10164)
"""JetStream's error codes for a lost compare-and-set."""

logger = log.get(__name__)


class NatsState:
    """See :class:`~services.core.state.store.StateStore`. The bucket is made at its first use.

    Args:
        bucket: letters, digits, ``-`` and ``_``.
        bounds: None keeps everything.
    """

    def __init__(self, connection: NatsConnection, bucket: str, bounds: Bounds | None = None) -> None:
        self._connection = connection
        self._bucket = bucket
        self._bounds = bounds
        self._stream = stream_of(bucket)
        self._subject = f"$KV.{bucket}."
        self._opened: KeyValue | None = None

    async def get(self, key: str) -> Entry | None:
        subject = encode(key)
        with self._using(f"read {key}"):
            try:
                found = await (await self._kv()).get(subject)
            except nats.js.errors.KeyNotFoundError:
                return None
        return Entry(key, found.value or b"", found.revision or 0)

    async def create(self, key: str, value: bytes) -> int:
        subject = encode(key)
        with self._using(f"create {key}"):
            try:
                return await self._put(subject, value, 0)
            except nats.js.errors.KeyWrongLastSequenceError:
                if (deleted := await self._tombstone(subject)) is not None:
                    return await self._put(subject, value, deleted)
                raise errors.ResourceExists(f"{key} exists already", field="name", hint="Choose another id.") from None

    async def update(self, key: str, value: bytes, revision: int) -> int:
        if revision <= 0:  # JetStream takes 0 for "must not be there"
            raise _mismatch(key, revision)
        subject = encode(key)
        with self._using(f"write {key}"):
            try:
                return await self._put(subject, value, revision)
            except nats.js.errors.KeyWrongLastSequenceError:
                raise _mismatch(key, revision) from None

    async def delete(self, key: str, revision: int | None = None) -> None:
        if revision is None:
            if (entry := await self.get(key)) is None:
                return
            try:
                return await self.delete(key, entry.revision)
            except errors.RevisionMismatch:
                return await self.delete(key)
        if revision <= 0:
            raise _mismatch(key, revision)
        subject = encode(key)
        with self._using(f"delete {key}"):
            try:
                await (await self._kv()).delete(subject, last=revision)
            except nats.js.errors.APIError as error:
                if error.err_code not in _WRONG_REVISION:
                    raise
                raise _mismatch(key, revision) from None

    async def list(self, prefix: str = "") -> list[Entry]:
        return sorted(await self._listed(prefix), key=lambda one: one.key)

    async def keys(self, prefix: str = "") -> Sequence[str]:
        with self._using(f"open {self._bucket}"):
            try:
                self._opened = self._opened or await self._connection.js.key_value(self._bucket)
            except nats.js.errors.BucketNotFoundError:
                return []
        return sorted(entry.key for entry in await self._listed(prefix, headers_only=True))

    async def _listed(self, prefix: str, *, headers_only: bool = False) -> Sequence[Entry]:
        waits = Backoff()
        for attempt in range(3):
            try:
                with self._using(f"list {prefix or self._bucket}"):
                    await self._kv()
                    found = await self._newest(prefix, headers_only)
                return [entry for entry in found.values() if entry.value is not None]
            except Interrupted as interruption:
                logger.info("a listing was interrupted", bucket=self._bucket, prefix=prefix, why=str(interruption))
                await asyncio.sleep(waits.delay(attempt))
        raise errors.StateUnavailable(f"NATS could not list {prefix or self._bucket}", retry_after=1.0)

    async def watch(self, prefix: str = "") -> AsyncIterator[Entry]:
        seen: int | None = None
        failures = 0
        waits = Backoff()
        while True:
            try:
                # One block for each request: a cancellation that the client swallows is raised at the block's end.
                with self._using(f"watch {prefix or self._bucket}"):
                    await self._kv()
                    if seen is not None and await self._last_revision() < seen:
                        seen = None  # the bucket was restored from an older copy, or lost
                filters = self._filters(prefix)
                async with OrderedReader(self._connection, self._stream, filters, after=seen) as reader:
                    failures = 0
                    until = time.monotonic() + RECONCILE_SECONDS * random.uniform(0.75, 1.25)
                    while time.monotonic() < until:
                        msg = await reader.next()
                        if msg is not None and (entry := self._entry(msg)).revision > (seen or 0):
                            seen = entry.revision
                            yield entry
            except (Interrupted, errors.StateUnavailable) as error:
                if self._connection.client.is_closed:
                    raise errors.StateUnavailable("the connection to NATS is closed") from error
                self._opened = None
                logger.info("a watch starts anew", bucket=self._bucket, prefix=prefix, why=str(error))
                await asyncio.sleep(waits.delay(failures))
                failures += 1

    async def _newest(self, prefix: str, headers_only: bool) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        filters = self._filters(prefix)
        async with OrderedReader(self._connection, self._stream, filters, headers_only=headers_only) as reader:
            waiting = reader.backlog
            while waiting:
                if (msg := await reader.next()) is not None:
                    waiting = msg.metadata.num_pending
                    entry = self._entry(msg)
                    found[entry.key] = entry
        return found

    async def _kv(self) -> KeyValue:
        if self._opened is None:
            try:
                self._opened = await self._connection.js.create_key_value(
                    bucket_config(self._bucket, self._connection.replicas, self._bounds)
                )
            except nats.js.errors.BadRequestError as error:
                if error.err_code != STREAM_EXISTS:
                    raise
                self._opened = await self._connection.js.key_value(self._bucket)
        return self._opened

    async def _put(self, subject: str, value: bytes, last: int) -> int:
        """What KeyValue.update does, with the trace beside it: who watches the key goes on with it."""
        await self._kv()
        headers: dict[str, str] = {api.Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(last)}
        if trace := tracing.traceparent():
            headers[tracing.HEADER] = trace
        try:
            return (await self._connection.js.publish(self._subject + subject, value, headers=headers)).seq
        except nats.js.errors.APIError as error:
            if error.err_code in _WRONG_REVISION:
                raise nats.js.errors.KeyWrongLastSequenceError(description=error.description) from None
            raise

    async def _tombstone(self, subject: str) -> int | None:
        """Revision at which a key was deleted; None when it was not."""
        try:
            await (await self._kv()).get(subject)
        except nats.js.errors.KeyNotFoundError as missing:
            return missing.entry.revision if missing.entry is not None else None
        return None

    async def _last_revision(self) -> int:
        return (await self._connection.js.stream_info(self._stream)).state.last_seq

    @contextmanager
    def _using(self, operation: str) -> Iterator[None]:
        try:
            with translated(operation):
                yield
        except errors.StateUnavailable:
            self._opened = None  # the bucket may be gone: the next use makes it anew
            raise

    def _filters(self, prefix: str) -> Sequence[str]:
        if not prefix:
            return [self._subject + ">"]
        subject = self._subject + encode(prefix.removesuffix("/"))
        return [subject + ".>"] if prefix.endswith("/") else [subject, subject + ".>"]

    def _entry(self, msg: Msg) -> Entry:
        headers = msg.headers or {}
        gone = headers.get(KV_OP) in ("DEL", "PURGE") or KV_MARKER_REASON in headers
        key = decode(msg.subject.removeprefix(self._subject))
        return Entry(key, None if gone else msg.data, msg.metadata.sequence.stream, headers.get(tracing.HEADER, ""))


def stream_of(bucket: str) -> str:
    """The stream in which JetStream holds a bucket."""
    return f"KV_{bucket}"


def bucket_config(bucket: str, replicas: int, bounds: Bounds | None = None) -> api.KeyValueConfig:
    """How every bucket is made."""
    return api.KeyValueConfig(
        bucket=bucket,
        history=1,
        ttl=bounds.age.total_seconds() if bounds else None,
        max_bytes=bounds.size if bounds else None,
        storage=api.StorageType.FILE,
        replicas=replicas,
        # Reads go to the leader: a replica could be behind an acknowledged write.
        direct=False,
    )


def encode(key: str) -> str:
    """The key as JetStream KV holds it: ``projects/p`` is ``projects.p``; dots and equals signs are escaped."""
    return check_key(key).replace("=", "=3d").replace(".", "=2e").replace("/", ".")


def decode(subject: str) -> str:
    return subject.replace(".", "/").replace("=2e", ".").replace("=3d", "=")


def _mismatch(key: str, revision: int) -> errors.RevisionMismatch:
    return errors.RevisionMismatch(f"{key} is not at revision {revision}", field="etag")
