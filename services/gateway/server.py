"""The HTTP or HTTPS server of the gateway: uvicorn, with the service's own logs, signals and drain."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from services.core import log
from services.core.errors import Unavailable
from services.gateway import https
from services.gateway.config import GatewaySettings
from services.gateway.edge.attending import LEAVING

_HEAD_BYTES = 32 << 10
"""Longest head of a request."""
_CONNECTIONS = 8
"""Connections for each request that may be answered at once: editors keep theirs between two keys."""
_IDLE = 60
"""Seconds for which a connection without requests stays: editors come back with the next key."""
_logger = log.get("gateway")


async def serve(settings: GatewaySettings, app: ASGIApp) -> None:
    """Serves until SIGTERM or SIGINT; raises what :func:`serving` does."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with serving(settings, app) as url:
        _logger.info("serving", url=url)
        await stopped.wait()
        _logger.info("draining", seconds=settings.drain_seconds)
    _logger.info("stopped")


@contextlib.asynccontextmanager
async def serving(settings: GatewaySettings, app: ASGIApp) -> AsyncIterator[str]:
    """Serves as long as the block runs; gives the address. Requests that run at its end have ``drain_seconds``.

    Raises:
        Unavailable: the address cannot be bound.
        InvalidArgument: the settings of HTTPS cannot be used.
    """
    tls = https.context(settings)
    with _bind(settings.listen) as listening:
        leaving = asyncio.Event()

        async def told(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, LEAVING: leaving}, receive, send)

        server = _Server(
            uvicorn.Config(
                told,
                http="h11",  # its limit on the head holds, and nothing has to be compiled
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=_CONNECTIONS * settings.gateway_requests,
                timeout_keep_alive=_IDLE,
                timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
                h11_max_incomplete_event_size=_HEAD_BYTES,
                ssl_context_factory=(lambda config, default: tls) if tls else None,
            )
        )
        task = asyncio.create_task(server.serve(sockets=[listening]))
        await server.up.wait()
        host, port = listening.getsockname()[:2]
        try:
            yield f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"
        finally:
            leaving.set()
            server.should_exit = True
            await task


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()
        """Set once requests are answered."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Tells when it is done."""
        await super().startup(sockets)
        self.up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the caller's. uvicorn would raise them anew at its end, and the process would die of them."""
        yield


def _bind(listen: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, int(port)), family=family, backlog=2048)
    except OSError as error:
        raise Unavailable(
            f"cannot listen on {listen}: {error.strerror}",
            field="CODEGRAFT_LISTEN",
            hint="Another process has the port, or the host is not this machine's; port 0 takes a free one.",
        ) from None
    # asyncio does this only for sockets that it makes itself. Without it an answer's body waits up to 40 ms for the
    # client's word that the head has arrived.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening
