"""The server that every service runs: health, reflection, limits, and an end that loses no call."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.core import log
from services.core.audit.log import AuditLog
from services.core.auth.gate import Gate
from services.core.config import CoreSettings
from services.core.errors import Unavailable
from services.core.quota.quotas import Quotas
from services.core.rpc import tls
from services.core.rpc.interceptors import CallInterceptor
from services.core.state import StateStore

Registration = tuple[Callable[[Any, grpc.aio.Server], None], Any, str]
"""(add_<Service>Servicer_to_server, the servicer, the service's full name)."""
Background = Callable[[], Coroutine[Any, Any, None]]
"""Makes a coroutine that runs beside the server until it is cancelled."""

MAX_RECEIVE_BYTES = 4 << 20
"""Uploads come in chunks of 1 MiB; nothing else is near this."""
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    # Connections end after a while, so that clients look at DNS again and find new replicas.
    ("grpc.max_connection_age_ms", 30 * 60_000),
    ("grpc.max_connection_age_grace_ms", 10 * 60_000),
    ("grpc.so_reuseport", 0),
]

_LAST_WORD = 0.1
"""Seconds between health's NOT_SERVING and the end of watches and of the listening socket, for the word to arrive."""

_Health = health_pb2.HealthCheckResponse
logger = log.get(__name__)


async def serve(
    settings: CoreSettings,
    services: Sequence[Registration],
    *,
    keys: StateStore | None = None,
    audit: AuditLog | None = None,
    quotas: Quotas | None = None,
    background: Sequence[Background] = (),
    serving_after: Mapping[str, Awaitable[Any]] = MappingProxyType({}),
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then drains: health says NOT_SERVING, background work is cancelled, streams of
    Watch… methods end with SHUTTING_DOWN, and the other running calls may end by themselves.

    Args:
        settings: where to listen, and how long running calls may go on after the signal.
        services: what to serve; each has its own health entry, and "" stands for all.
        keys: the bucket of the API keys; needed unless the settings have authentication off.
        audit: takes a record of every call that changes something.
        quotas: counts the calls, and refuses those of whoever is over a limit.
        background: work beside the server (workers, followers), on which no running call may depend. When one
            fails, the process ends with its error: a service that only looks alive is worse than one that is restarted.
        serving_after: by a service's full name, what has to be there before its own health entry says SERVING; its
            calls are answered before, and the entry "" does not wait. For balancers that shall pass a replica by until
            it is quick.
        ready: called with the bound address once calls are answered.

    Raises:
        Unavailable: the address cannot be bound.
        InvalidArgument: the settings of authentication or TLS cannot be used.
    """
    gate = Gate.of(settings, keys)
    calls = CallInterceptor(gate, audit, quotas)
    server = grpc.aio.server(interceptors=[calls], options=_OPTIONS)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    for add, servicer, _ in services:
        add(servicer, server)
    names = [name for _, _, name in services]
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    address = _bind(server, settings)
    await server.start()
    stopped = _stop_signal()
    tasks = [asyncio.create_task(make()) for make in (gate.run, *([quotas.run] if quotas else []), *background)]
    for name in ("", *names):
        await checks.set(name, _Health.NOT_SERVING if name in serving_after else _Health.SERVING)
    opening = [asyncio.create_task(_open_after(checks, name, awaited)) for name, awaited in serving_after.items()]
    logger.info("serving", address=address, services=names)
    if ready is not None:
        ready(address)
    waiting = asyncio.create_task(stopped.wait())
    try:
        # A background coroutine that simply returns has done its work; one that raises ends the service.
        pending: set[asyncio.Task[Any]] = {waiting, *tasks}
        while waiting in pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {waiting}:
                task.result()
    finally:
        for task in (waiting, *opening):
            task.cancel()
        logger.info("draining", seconds=settings.drain_seconds)
        await checks.enter_graceful_shutdown()
        running = [task for task in tasks if not task.done()]
        for task in running:
            task.cancel()
        await asyncio.sleep(_LAST_WORD)
        calls.end_watches()
        await server.stop(settings.drain_seconds)
        await calls.settle()
        for outcome in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(outcome, Exception):
                logger.warning("background work ended with an error", exc_info=outcome)
        logger.info("stopped")


def _bind(server: grpc.aio.Server, settings: CoreSettings) -> str:
    listen, credentials = settings.listen, tls.server_credentials(settings)
    host = listen.rpartition(":")[0]
    try:
        port = server.add_secure_port(listen, credentials) if credentials else server.add_insecure_port(listen)
    except RuntimeError as error:
        raise Unavailable(
            f"cannot listen on {listen}: {error}",
            field="CODEGRAFT_LISTEN",
            hint="Another process has the port, or the host is not this machine's; port 0 takes a free one.",
        ) from None
    return f"{host}:{port}"


def _stop_signal() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set; a second SIGINT, from a person who does not want to wait, ends the process.

    A second SIGTERM does not: Ctrl-C reaches a whole process group, and its supervisor sends SIGTERM besides.
    """
    stopped = asyncio.Event()

    def on_signal(number: int) -> None:
        if stopped.is_set() and number == signal.SIGINT:
            os._exit(128 + number)  # SystemExit would wait for threads, and a stuck one is why somebody insists
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return stopped


async def _open_after(checks: health.aio.HealthServicer, name: str, awaited: Awaitable[Any]) -> None:
    # A failure is told by whoever makes what is awaited; and others may wait for the same, so it is not cancelled here.
    with contextlib.suppress(Exception):
        await asyncio.shield(awaited)
        await checks.set(name, _Health.SERVING)
        logger.info("serving at last", services=[name])
