"""The gateway of a local stack: a service that speaks HTTP."""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from datetime import timedelta

from services.core.rpc.probe import SERVING, UNREACHABLE

NAME = "gateway"
_DROPPED = (
    "CODEGRAFT_TLS_",
    "CODEGRAFT_NATS_",
    "CODEGRAFT_S3_",
    "CODEGRAFT_API_KEY",
    "CODEGRAFT_GATEWAY_CERT_FILE",  # on loopback it speaks plain HTTP
    "CODEGRAFT_GATEWAY_KEY_FILE",
)


def environment(base: Mapping[str, str], addresses: Mapping[str, str], console_key: str) -> dict[str, str]:
    """What it finds in its environment: where the services are, and no credentials. Its callers bring theirs.

    Args:
        console_key: seals the console's cookies.
    """
    own = {name: value for name, value in base.items() if not name.startswith(_DROPPED)}
    services = {f"CODEGRAFT_{name.upper()}_ADDRESS": address for name, address in addresses.items() if name != NAME}
    return {**own, **services, "CODEGRAFT_LISTEN": addresses[NAME], "CODEGRAFT_GATEWAY_CONSOLE_KEY": console_key}


def check(address: str, timeout: timedelta = timedelta(seconds=2)) -> str:
    """Its health as a word: ``serving``, ``not_serving`` or ``unreachable``.

    Args:
        address: host:port.
        timeout: for the connection, and again for the answer.
    """
    connection = http.client.HTTPConnection(address, timeout=timeout.total_seconds())
    try:
        connection.request("GET", "/health")
        return SERVING if connection.getresponse().status == 200 else "not_serving"
    except (OSError, http.client.HTTPException):
        return UNREACHABLE
    finally:
        connection.close()


def url(address: str) -> str:
    """What a person gives to an editor."""
    return f"http://{address}"


def console(address: str) -> str:
    """What a person opens in a browser."""
    return f"{url(address)}/console"
