"""Ports on loopback that are free now and were, where possible, the same at the last start."""

from __future__ import annotations

import random
import socket
from collections.abc import Mapping, Sequence

from services.core.errors import ResourceExhausted

HOST = "127.0.0.1"
RANGE = range(17_000, 32_000)
"""Below Linux's ephemeral range (from 32768), so that no outgoing connection takes a remembered port."""


def is_free(port: int) -> bool:
    """Whether a server could listen on the port now, and would be alone there.

    SO_REUSEADDR lets ports pass whose last connections have only just closed. SO_REUSEPORT is not set: with it, as gRPC
    servers do, a port that another server listens on would be shared silently.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def choose(names: Sequence[str], remembered: Mapping[str, int]) -> dict[str, int]:
    """A free port for every name: the remembered one unless somebody else took it.

    Raises:
        ResourceExhausted: no free port was found.
    """
    chosen: dict[str, int] = {}
    for name in names:
        port = remembered.get(name)
        if port is None or port in chosen.values() or not is_free(port):
            port = _any_free(taken={*chosen.values(), *remembered.values()})
        chosen[name] = port
    return chosen


def _any_free(taken: set[int]) -> int:
    for _ in range(1_000):
        port = random.choice(RANGE)
        if port not in taken and is_free(port):
            return port
    raise ResourceExhausted(
        f"no free port between {RANGE.start} and {RANGE.stop - 1} on {HOST}", hint="Stop programs that listen there."
    )
