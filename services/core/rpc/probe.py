"""Whether a service answers grpc.health.v1, asked from outside as any load balancer would.

    python -m services.core.rpc.probe                  this container's own service, where CODEGRAFT_LISTEN says
    python -m services.core.rpc.probe HOST:PORT --service codegraft.inference.v1.CompletionService

A server with TLS is asked with CODEGRAFT_TLS_CA_FILE, and CODEGRAFT_TLS_CERT_FILE and _KEY_FILE where it wants a
certificate, as services ask each other; --name says for which name its certificate was made.

It exits with 0 when the answer is SERVING, else with 1 and the answer on stderr: what a container's health check wants.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from services.core.errors import CodegraftError
from services.core.rpc.tls import ClientFiles

SERVING = "serving"
UNREACHABLE = "unreachable"
LISTEN_VARIABLE = "CODEGRAFT_LISTEN"
_EVERY_ADDRESS = ("0.0.0.0", "[::]", "::")
"""What a server listens on and nobody can call."""


def check(
    address: str,
    timeout: timedelta = timedelta(seconds=2),
    *,
    service: str = "",
    tls: ClientFiles | None = None,
    name: str = "",
) -> str:
    """The server's health as a word: ``serving``, ``not_serving``, ``unreachable`` …

    Args:
        address: host:port of a gRPC server.
        timeout: how long to wait for the connection and the answer together.
        service: full name of one of the server's services; empty for the server as a whole.
        tls: certificates; None for a server without TLS.
        name: what the server's certificate was made for, where that is not the address.
    """
    with _channel(address, tls, name) as channel:
        call = channel.unary_unary(  # the generated stub has no types
            "/grpc.health.v1.Health/Check",
            request_serializer=HealthCheckRequest.SerializeToString,
            response_deserializer=HealthCheckResponse.FromString,
        )
        try:
            answer = call(HealthCheckRequest(service=service), timeout=timeout.total_seconds())
        except grpc.RpcError as error:
            code = error.code()
            unreached = code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
            return UNREACHABLE if unreached else str(code.name).lower()
    return HealthCheckResponse.ServingStatus.Name(answer.status).lower()


def _channel(address: str, tls: ClientFiles | None, name: str) -> grpc.Channel:
    options: list[tuple[str, object]] = [("grpc.enable_http_proxy", 0)]
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    if name:
        options.append(("grpc.ssl_target_name_override", name))
    return grpc.secure_channel(address, tls.credentials(), options=options)


def certificates() -> ClientFiles | None:
    """Those that the environment names; None without an authority."""
    ca, cert, key = (os.environ.get(f"CODEGRAFT_TLS_{one}_FILE") for one in ("CA", "CERT", "KEY"))
    if not ca:
        return None
    # gRPC aborts the process when it gets one of the two.
    return ClientFiles(Path(ca), Path(cert), Path(key)) if cert and key else ClientFiles(Path(ca))


def own_address(listen: str) -> str:
    """Where a server that listens there is called from its own machine: one for every address is on loopback, too."""
    host, _, port = listen.rpartition(":")
    return f"127.0.0.1:{port}" if host in _EVERY_ADDRESS else listen


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m services.core.rpc.probe", description="Asks a gRPC server for its health; 0 means SERVING."
    )
    parser.add_argument("address", nargs="?", help=f"host:port; without it, the port of {LISTEN_VARIABLE} on loopback")
    parser.add_argument("--service", default="", help="full name of a gRPC service; without it, the server as a whole")
    parser.add_argument("--name", default="", help="name in the server's certificate, where it is not the address's")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds to wait (2)")
    given = parser.parse_args(argv)
    address = given.address or own_address(os.environ.get(LISTEN_VARIABLE, ""))
    if not address:
        parser.error(f"give an address, or set {LISTEN_VARIABLE}")
    timeout = timedelta(seconds=given.timeout)
    try:
        answer = check(address, timeout, service=given.service, tls=certificates(), name=given.name)
    except CodegraftError as error:
        print(error, file=sys.stderr)
        return 1
    if answer != SERVING:
        print(f"{address} is {answer}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
