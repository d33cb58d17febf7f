"""The process that starts the parts of a whole stack: a test has gRPC's threads, and what forks beside them may crash.

Its functions are called over a pool of one process, see stack.py. What it started ends with it, and it with the test.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from services.cli.local import nats, ports, s3
from services.cli.local.process import PR_SET_PDEATHSIG, Child

GRACE = timedelta(seconds=10)

_children: dict[str, Child] = {}


def initialize(left: Sequence[int]) -> None:
    """The kernel kills this process when the test ends, however it does.

    Args:
        left: ports to choose from for what is chosen here.
    """
    ports.RANGE = left  # type: ignore[assignment]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def begin_nats(**options: Any) -> int:
    """Process id, once it lets us in."""
    return _adopt(nats.start(**options))


def begin_s3(**options: Any) -> int:
    """As above."""
    return _adopt(s3.start(**options))


def begin_service(name: str, service: str, log: Path, environment: Mapping[str, str], folder: Path) -> int:
    """Process id, at once."""
    return _adopt(
        Child.start(name, [sys.executable, "-m", f"services.{service}"], log=log, env=environment, cwd=folder)
    )


def kill(name: str) -> None:
    """SIGKILL, and waits for the end."""
    child = _children[name]
    if child.exit_code() is None:
        os.kill(child.pid, signal.SIGKILL)
    child.wait(GRACE)


def kill_all() -> None:
    for name in reversed(_children):
        kill(name)


def state(name: str) -> str:
    """How a part has ended, or that it has not."""
    return _children[name].describe_exit()


def _adopt(child: Child) -> int:
    _children[child.name] = child
    return child.pid
