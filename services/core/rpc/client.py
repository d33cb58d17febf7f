"""Channels to other services: balanced, kept alive, and carrying the caller's deadline and request id on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from services.core.rpc import context as call_context
from services.core.rpc.spans import spans
from services.core.rpc.tls import ClientFiles

if TYPE_CHECKING:
    from pydantic import SecretStr

Metadata = tuple[tuple[str, str], ...]
AUTHORIZATION = "authorization"
"""Metadata key; its value is ``Bearer`` and an API key or a token."""

DEFAULT_DEADLINE = 30.0
"""Seconds for a unary call that has no other deadline: gRPC itself would wait for ever."""

_SERVICE_CONFIG = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})
"""No retry policy: gRPC repeats by itself only what no server has seen. Whether more may be repeated depends on the
call, and services/client knows."""
OPTIONS: list[tuple[str, Any]] = [
    ("grpc.service_config", _SERVICE_CONFIG),
    ("grpc.enable_retries", 1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # The services are neighbours: http_proxy in the environment is for the way out, and would take loopback too.
    ("grpc.enable_http_proxy", 0),
    # By default a process's channels share connections by address, and with them the wait after a failed one: a new
    # channel would fail at once where an older one to the same address found nothing a moment ago.
    ("grpc.use_local_subchannel_pool", 1),
]


def target(address: str) -> str:
    """host:port as a target whose every DNS address gets its share of the calls."""
    return address if "://" in address or address.startswith(("dns:", "unix:")) else f"dns:///{address}"


class Identity(Protocol):
    """What the settings say of how a service calls others."""

    @property
    def api_key(self) -> SecretStr: ...
    @property
    def tls_ca_file(self) -> Path | None: ...
    @property
    def tls_cert_file(self) -> Path | None: ...
    @property
    def tls_key_file(self) -> Path | None: ...


def channel(address: str, identity: Identity | None = None) -> grpc.aio.Channel:
    """A channel for calls from within a service: deadline, request id and trace of the call being served go along.

    Its calls come with the service's own API key, not with that of the call being served: what they ask for, the
    service needs for itself, and the caller may have no right to it.

    Args:
        identity: the service's settings; None has no key and no TLS.

    Raises:
        InvalidArgument: a file of the TLS settings cannot be read.
    """
    key = identity.api_key.get_secret_value() if identity else ""
    adding = [*spans(), *pass_through(((AUTHORIZATION, f"Bearer {key}"),) if key else ())]
    if identity is None or identity.tls_ca_file is None:
        return grpc.aio.insecure_channel(target(address), options=OPTIONS, interceptors=adding)
    files = ClientFiles(identity.tls_ca_file, identity.tls_cert_file, identity.tls_key_file)
    return grpc.aio.secure_channel(target(address), files.credentials(), options=OPTIONS, interceptors=adding)


def pass_through(always: Metadata = ()) -> Sequence[grpc.aio.ClientInterceptor]:
    """Interceptors that add deadline, request id, trace and ``always`` to every call."""
    return [_UnaryUnary(always), _UnaryStream(always), _StreamUnary(always)]


class _Adding:
    def __init__(self, always: Metadata) -> None:
        self._always = always

    def details(self, given: grpc.aio.ClientCallDetails, *, unary: bool) -> grpc.aio.ClientCallDetails:
        return _details(given, self._always, unary=unary)


def _details(given: grpc.aio.ClientCallDetails, always: Metadata, *, unary: bool) -> grpc.aio.ClientCallDetails:
    timeout = call_context.shortened(given.timeout)
    if timeout is None and unary:
        timeout = DEFAULT_DEADLINE
    metadata = grpc.aio.Metadata(*(given.metadata or ()))
    present = set(metadata.keys())
    for key, value in (*call_context.outgoing(), *always):
        if key not in present:
            metadata.add(key, value)
    return grpc.aio.ClientCallDetails(given.method, timeout, metadata, given.credentials, given.wait_for_ready)


class _UnaryUnary(_Adding, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(self.details(client_call_details, unary=True), request)


class _UnaryStream(_Adding, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(self.details(client_call_details, unary=False), request)


class _StreamUnary(_Adding, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request_iterator: Any
    ) -> Any:
        return await continuation(self.details(client_call_details, unary=False), request_iterator)
