"""The one connection of a process to NATS: how it is opened, kept for ever, and how its failures are named.

State, jobs and events share it. NATS errors never leave services/core: :func:`translated` turns them into
:class:`~services.core.errors.StateUnavailable`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import Callable, Iterator
from datetime import timedelta

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js import api

from services.core import errors, log
from services.core.telemetry import figures

REQUEST_TIMEOUT = 5.0
"""Seconds that one request to JetStream may take; longer than a server's restart on the same machine."""

STREAM_EXISTS = 10058
"""JetStream's error code for a stream that is there with other settings."""

LONGEST_SUBJECT = 3500
"""Bytes. A line of the protocol may have 4,096, with the inbox for the answer and the sizes."""

_NO_ROOM = (10023, 10047)
"""JetStream's error codes for a server that has taken all that it may of its disk."""
_ROOM = (
    "Give it room: its disk, or what JetStream may take of it, is full (docs/runbooks/disk-full.md). "
    "Nothing that was acknowledged is lost."
)
_LOOK = "Look at its log and its disk: one that ran full is silent until it is restarted (docs/runbooks/disk-full.md)."

_TOKEN = re.compile(r"[A-Za-z0-9_-]+")

logger = log.get(__name__)


class _Client(Client):
    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        # Of a longer line the server thinks that it is no NATS client, hangs up, and the library closes for good.
        if len(subject.encode()) > LONGEST_SUBJECT:
            raise nats.errors.BadSubjectError
        await super().publish(subject, payload, reply, headers)


class _TlsClient(_Client):
    """The library sends its credentials in clear text to a server that offers no TLS, whatever it was told."""

    def _connect_command(self) -> bytes:
        if not self._server_info.get("tls_required"):
            raise nats.errors.Error("the server offers no TLS")
        command: bytes = super()._connect_command()
        return command


class NatsConnection:
    """An open connection. Make it with :func:`connect`.

    Attributes:
        client: the core NATS client; reconnects by itself, for ever.
        js: its JetStream context.
        replicas: copies of every stream and bucket that this process creates (1, or 3 on a cluster).
        on_reconnect: called, on the event loop, after each reconnection.
        closing: whether the end of the connection is our own wish.
    """

    def __init__(self, client: Client, replicas: int) -> None:
        self.client = client
        self.js = client.jetstream(timeout=REQUEST_TIMEOUT)
        self.replicas = replicas
        self.on_reconnect: set[Callable[[], None]] = set()
        self.closing = False

    async def ensure_stream(self, config: api.StreamConfig) -> None:
        """Creates the stream. One that is there already is kept as its operators set it.

        Raises:
            StateUnavailable: NATS does not answer.
        """
        config.num_replicas = self.replicas
        with translated(f"create stream {config.name}"):
            try:
                await self.js.add_stream(config)
            except nats.js.errors.BadRequestError as error:
                if error.err_code != STREAM_EXISTS:
                    raise

    async def close(self) -> None:
        """Sends what is buffered, then closes. Safe to call twice."""
        self.closing = True
        if self.client.is_connected:
            with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
                await self.client.flush(timeout=2)
        await close_client(self.client)


async def close_client(client: Client) -> None:
    """Closes the client, also one that is just noticing that its connection is gone.

    Its reconnection is then waiting for the socket's end; the client cancels it, waits for the same future, which was
    cancelled with it, and so raises a cancellation that nobody asked for.
    """
    task = asyncio.current_task()
    cancellations = task.cancelling() if task is not None else 0
    try:
        await client.close()
    except asyncio.CancelledError:
        if task is None or task.cancelling() > cancellations:
            raise


async def connect(
    url: str,
    *,
    user: str = "",
    password: str = "",
    tls: ssl.SSLContext | None = None,
    name: str = "codegraft",
    replicas: int = 1,
    patience: timedelta = timedelta(seconds=5),
) -> NatsConnection:
    """Connects once, and fails soon: waiting for a server that is still starting is the caller's business.

    Args:
        url: comma-separated URLs of the servers, for example ``nats://127.0.0.1:4222``.
        user: empty for a server without authentication. Answers come to inboxes below ``_INBOX.<user>``, so that the
            server can close every other one to it.
        tls: certificates; a server without TLS is then refused.
        name: shown in the server's connection list.
        replicas: copies of every stream and bucket; 3 on a cluster.
        patience: how long to wait for the servers' answer.

    Raises:
        StateUnavailable: no server answers, or the credentials are refused; says which.
    """
    client = _Client() if tls is None else _TlsClient()
    servers = [part.strip() for part in url.split(",") if part.strip()]
    failures: list[Exception] = []
    all_failed = asyncio.Event()
    connection: NatsConnection | None = None

    async def on_error(error: Exception) -> None:
        if connection is None:
            # A server that refuses the credentials hangs up, often before its reason could be read: the client tries
            # again by itself, and sooner or later we learn it.
            if not isinstance(error, ConnectionResetError | nats.errors.UnexpectedEOF):
                failures.append(error)
            if len(failures) >= len(servers):
                all_failed.set()
        else:
            logger.warning("NATS error", error=describe(error))

    async def on_disconnect() -> None:
        if connection is not None and not connection.closing:
            figures.NATS_CONNECTED.labels(name).set(0)
            logger.warning("disconnected from NATS; reconnecting")

    async def on_reconnect() -> None:
        logger.info("reconnected to NATS")
        figures.NATS_CONNECTED.labels(name).set(1)
        if connection is not None:
            for notify in list(connection.on_reconnect):
                notify()

    async def on_close() -> None:
        if connection is not None and not connection.closing:
            # Only refused credentials end it for good: they were changed while we were away.
            logger.error("NATS closed the connection for good")

    connecting = asyncio.ensure_future(
        client.connect(
            servers,
            name=name,
            user=user or None,
            password=password or None,
            inbox_prefix=f"_INBOX.{user}" if _TOKEN.fullmatch(user) else "_INBOX",
            tls=tls,
            connect_timeout=int(patience.total_seconds()) or 1,
            # The default gives up after two minutes and closes the client for good.
            max_reconnect_attempts=-1,
            reconnect_time_wait=1,
            # Two unanswered pings: a server that vanished without a word is noticed within half a minute.
            ping_interval=10,
            max_outstanding_pings=2,
            error_cb=on_error,
            disconnected_cb=on_disconnect,
            reconnected_cb=on_reconnect,
            closed_cb=on_close,
        )
    )
    failing = asyncio.ensure_future(all_failed.wait())
    try:
        await asyncio.wait({connecting, failing}, timeout=patience.total_seconds(), return_when=asyncio.FIRST_COMPLETED)
        if connecting.done() and connecting.exception() is None:
            connection = NatsConnection(client, replicas)
            figures.NATS_CONNECTED.labels(name).set(1)
            return connection
        failure = connecting.exception() if connecting.done() else None
        cause = failures[-1] if failures else failure or client.last_error
    finally:
        failing.cancel()
        if connection is None:
            connecting.cancel()
            await asyncio.wait({connecting}, timeout=1)  # bounded: the client may swallow the cancellation
            with contextlib.suppress(Exception):  # a half-open client fails in many ways, none of interest
                await close_client(client)
    raise errors.StateUnavailable(
        f"cannot connect to NATS at {log.scrub(url)}: "
        + (describe(cause) if cause else f"no answer within {patience.total_seconds():g} s"),
        field="nats_url",
        hint="Check CODEGRAFT_NATS_URL, CODEGRAFT_NATS_USER and CODEGRAFT_NATS_PASSWORD, and that the server runs.",
        retry_after=1.0,
    ) from cause


@contextlib.contextmanager
def translated(operation: str) -> Iterator[None]:
    """Raises our errors in place of those of the NATS client, and cancellations that the client swallowed.

    The client waits with ``asyncio.wait_for``, which until Python 3.12 returns a result that arrives together with a
    cancellation, and forgets the cancellation: a task that was told to stop would go on for ever.

    Args:
        operation: what is being done, for the message ("read projects/p").

    Raises:
        StateUnavailable: NATS did not answer, refused, or lost the stream.
        LimitExceeded: the value is larger than the server takes.
    """
    task = asyncio.current_task()
    cancellations = task.cancelling() if task is not None else 0
    try:
        yield
        if task is not None and task is asyncio.current_task() and task.cancelling() > cancellations:
            raise asyncio.CancelledError
    except nats.errors.MaxPayloadError as error:
        raise errors.LimitExceeded(
            f"NATS refused to {operation}: the value is too large", hint="Keep a record below 1 MiB."
        ) from error
    except (nats.errors.Error, OSError, TimeoutError) as error:
        if not _is_answer(error):
            figures.NATS_ERRORS.inc()
        raise errors.StateUnavailable(
            f"NATS could not {operation}: {describe(error)}", hint=_hint(error), retry_after=1.0
        ) from error


def _is_answer(error: BaseException) -> bool:
    """Whether NATS did what it was asked for, and said no: a subject that is full, a stream with other settings."""
    return isinstance(error, nats.js.errors.APIError) and error.code is not None and int(error.code) < 500


def _hint(error: BaseException) -> str:
    match error:
        case nats.js.errors.APIError(err_code=code) if code in _NO_ROOM:
            return _ROOM
        case TimeoutError():
            return _LOOK
        case _:
            return ""


def describe(error: BaseException) -> str:
    """The error in a few words; most of the client's errors have an empty or a decorated text."""
    match error:
        case nats.js.errors.APIError(err_code=code) if code in _NO_ROOM:
            return "it has no room left"
        case nats.js.errors.APIError(description=str() as description):
            return description
        case nats.errors.TimeoutError() | TimeoutError():
            return "no answer in time"
        case nats.errors.NoRespondersError() | nats.js.errors.NoStreamResponseError():
            return "JetStream or the stream is not there"
        case ConnectionRefusedError():
            return "connection refused"
        case _:
            return str(error).removeprefix("nats: ").strip("' ") or type(error).__name__
