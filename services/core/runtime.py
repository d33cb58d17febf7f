"""What a service stands on, opened together: NATS (state, jobs, events) and the object store (blobs, artifacts)."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import ssl
import sys
import tempfile
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

from services.core import config, log
from services.core.audit.log import AuditLog, MemoryAudit
from services.core.audit.nats import NatsAudit
from services.core.auth import keyring
from services.core.backoff import Backoff
from services.core.config import CoreSettings
from services.core.errors import CodegraftError, InvalidArgument, StateUnavailable, Unavailable
from services.core.events import EventBus, MemoryBus
from services.core.events.nats import NatsBus
from services.core.jobs import JobQueue, MemoryQueue
from services.core.jobs.nats import NatsQueue
from services.core.nats_connection import NatsConnection, connect
from services.core.quota.channel import Channel
from services.core.quota.limits import NONE, Defaults
from services.core.quota.nats import NatsChannel
from services.core.quota.quotas import Quotas
from services.core.quota.storage import Stored, artifact_ended, told
from services.core.state import Bounds, MemoryState, StateStore
from services.core.state.nats import NatsState
from services.core.store import Artifacts, Blobs, MemoryStore, ObjectStore, S3Store
from services.core.store.s3 import S3Address
from services.core.telemetry import process

PROBE_TIMEOUT = timedelta(seconds=5)
"""Longest wait for one answer while starting; a server that is up answers within milliseconds."""

Connected = TypeVar("Connected")
Settings = TypeVar("Settings", bound=CoreSettings)
logger = log.get(__name__)


class Runtime:
    """The open connections of one process. Use ``async with Runtime.open(...)``, or :meth:`memory` in tests.

    Attributes:
        jobs: queue of work for workers.
        events: bus of what happened.
        audit: log of who changed what.
        store: objects by key.
        blobs: objects by digest, over the store.
        artifacts: immutable named artifacts, over the store and the local cache.
        quotas: what projects and keys may use; the server keeps them up to date.
        storage: room for artifacts of projects; ingest, which has records of its own, makes its own.
    """

    def __init__(
        self,
        *,
        state: Callable[[str, Bounds | None], StateStore],
        jobs: JobQueue,
        events: EventBus,
        audit: AuditLog,
        store: ObjectStore,
        cache_dir: Path,
        check: Callable[[], Awaitable[None]],
        quota_project: Defaults = NONE,
        quota_key: Defaults = NONE,
        channel: Channel | None = None,
    ) -> None:
        self._open_state = state
        self._states: dict[str, StateStore] = {}
        self._check = check
        self.jobs = jobs
        self.events = events
        self.audit = audit
        self.store = store
        self.blobs = Blobs(store)
        self.artifacts = Artifacts(store, cache_dir)
        self.quotas = Quotas(self.state(keyring.BUCKET), quota_project, quota_key, channel)
        self.storage = Stored(store, told).places(self.quotas, self.state(keyring.BUCKET), artifact_ended)

    def state(self, bucket: str, bounds: Bounds | None = None) -> StateStore:
        """The records of one bucket (one per service); the same object for the same bucket.

        Args:
            bounds: of a bucket that does not keep everything.
        """
        if bucket not in self._states:
            self._states[bucket] = self._open_state(bucket, bounds)
        return self._states[bucket]

    async def check(self) -> None:
        """Returns when NATS and the object store answer now; for readiness.

        Raises:
            StateUnavailable: NATS does not answer.
            StoreUnavailable: the object store does not.
        """
        await self._check()

    @classmethod
    @asynccontextmanager
    async def open(cls, service: str, settings: CoreSettings) -> AsyncIterator[Runtime]:
        """Connects, waiting for servers that are still starting, and closes at the end.

        Every failed try is one log line; the waits between them grow and are jittered.

        Args:
            service: name of the service, shown at NATS and in events.

        Raises:
            StateUnavailable: NATS was not there within ``startup_timeout_seconds``.
            StoreUnavailable: the object store was not.
            InvalidArgument: a setting is not usable.
        """
        log.hide(settings.nats_password, settings.s3_access_key, settings.s3_secret_key, settings.api_key)
        deadline = asyncio.get_running_loop().time() + settings.startup_timeout_seconds
        async with AsyncExitStack() as stack:
            connection = await _waiting("NATS", lambda: connect_nats(service, settings), deadline)
            stack.push_async_callback(connection.close)
            await _waiting("the object store", lambda: _prepare_store(settings), deadline)
            store = S3Store(s3_address(settings))
            stack.callback(store.close)
            logger.info("connected", nats=settings.nats_url, s3=settings.s3_endpoint, bucket=settings.s3_bucket)

            async def check() -> None:
                if not connection.client.is_connected:
                    raise StateUnavailable("disconnected from NATS, reconnecting", field="nats_url", retry_after=1)
                await store.check()

            yield cls(
                state=lambda bucket, bounds: NatsState(connection, bucket, bounds),
                jobs=NatsQueue(connection, ack_wait=settings.job_lease),
                events=NatsBus(connection, f"codegraft/{service}"),
                audit=NatsAudit(connection, service),
                store=store,
                cache_dir=settings.cache_dir,
                check=check,
                quota_project=settings.quota_project,
                quota_key=settings.quota_key,
                channel=NatsChannel(connection, service),
            )

    @classmethod
    def memory(
        cls, cache_dir: Path | None = None, *, quota_project: Defaults = NONE, quota_key: Defaults = NONE
    ) -> Runtime:
        """Fakes of everything, for tests; the cache is a temporary folder unless given."""
        folder = cache_dir or Path(tempfile.mkdtemp(prefix="codegraft-"))

        async def check() -> None:
            return None

        runtime = cls(
            state=lambda _bucket, _bounds: MemoryState(),
            jobs=MemoryQueue(),
            events=MemoryBus(),
            audit=MemoryAudit(),
            store=MemoryStore(),
            cache_dir=folder,
            check=check,
            quota_project=quota_project,
            quota_key=quota_key,
        )
        if cache_dir is None:
            weakref.finalize(runtime, shutil.rmtree, folder, ignore_errors=True)
        return runtime


def run(service: str, settings_class: type[Settings], main: Callable[[Settings], Awaitable[None]]) -> int:
    """The life of a service's process: settings, logging, ``main``; the exit status.

    A failure that has a reason (a wrong setting, a server that is not there) ends as one log line, without a trace.
    """
    log.configure(service)
    try:
        settings = config.load(settings_class)
        log.configure(service, settings.log_level)

        async def body() -> None:
            await main(settings)

        with process.telling(service, settings):
            asyncio.run(body())
    except CodegraftError as error:
        logger.error("cannot run", error=error.message, reason=error.reason, field=error.field, hint=error.hint)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def leave(status: int) -> NoReturn:
    """Ends the process after :func:`run`, whatever its threads still do: nobody waits for what they come to.

    The interpreter would wait for those of thread pools, and a thread that it stops in the middle of importing torch
    aborts the process.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


async def _waiting(what: str, attempt: Callable[[], Awaitable[Connected]], deadline: float) -> Connected:
    """Repeats the attempt until it succeeds or the deadline (of the loop's clock) has passed."""
    clock = asyncio.get_running_loop().time
    began, backoff, tries = clock(), Backoff(), 0
    while True:
        try:
            return await attempt()
        except Unavailable as error:
            left, delay = deadline - clock(), backoff.delay(tries)
            if left <= delay:
                raise type(error)(
                    f"gave up waiting for {what} after {clock() - began:.1f} s and {tries + 1} tries: {error.message}",
                    field=error.field,
                    hint=error.hint,
                ) from None
            logger.warning(f"waiting for {what}", error=error.message, tries=tries + 1, next_try_in=round(delay, 2))
        await asyncio.sleep(delay)
        tries += 1


async def connect_nats(service: str, settings: CoreSettings) -> NatsConnection:
    """Connects once to the NATS that the settings name.

    Raises:
        StateUnavailable: it does not answer, or refuses the credentials.
        InvalidArgument: a file of the TLS settings cannot be used.
    """
    return await connect(
        settings.nats_url,
        user=settings.nats_user,
        password=settings.nats_password.get_secret_value(),
        tls=nats_tls(settings),
        name=f"codegraft-{service}",
        replicas=settings.nats_replicas,
        patience=PROBE_TIMEOUT,
    )


def nats_tls(settings: CoreSettings) -> ssl.SSLContext | None:
    """TLS of connections to NATS as the settings have it; None without.

    Raises:
        InvalidArgument: a file cannot be used.
    """
    if settings.nats_ca_file is None:
        return None
    try:
        context = ssl.create_default_context(cafile=str(settings.nats_ca_file))
        if settings.nats_cert_file is not None:
            context.load_cert_chain(settings.nats_cert_file, settings.nats_key_file)
    except (OSError, ssl.SSLError) as error:
        raise InvalidArgument(
            f"the certificates for NATS cannot be used: {error}",
            field="CODEGRAFT_NATS_CA_FILE",
            hint="Give PEM files that belong together.",
        ) from None
    return context


async def _prepare_store(settings: CoreSettings) -> None:
    # A client of its own, that gives up soon: a thread that hangs in a request cannot be stopped, only outwaited.
    probe = S3Store(s3_address(settings), connect_timeout=PROBE_TIMEOUT, read_timeout=PROBE_TIMEOUT, retries=0)
    try:
        await probe.prepare()
    finally:
        probe.close()


def s3_address(settings: CoreSettings) -> S3Address:
    """The bucket that the settings name, and how to be let in."""
    return S3Address(
        settings.s3_endpoint,
        settings.s3_bucket,
        settings.s3_access_key.get_secret_value(),
        settings.s3_secret_key.get_secret_value(),
        settings.s3_secure,
    )
