"""Child processes that end with their parent: start, watch, stop, and the tail of their log."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

PR_SET_PDEATHSIG = 1
LOG_LIMIT = 16 * 1024 * 1024
"""A log longer than this many bytes is set aside (one generation) when its process starts again."""


class Child:
    """One process of the stack, with its output in a log file.

    Start children from the main thread, before any gRPC channel exists: the kernel ties the death signal to the thread
    that forked, and gRPC's threads do not survive a fork.
    """

    def __init__(self, name: str, popen: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.log = log
        self._popen = popen

    @classmethod
    def start(
        cls, name: str, argv: Sequence[str], *, log: Path, env: Mapping[str, str], cwd: Path | None = None
    ) -> Child:
        """Runs ``argv`` in a session of its own: a terminal's Ctrl-C reaches only the parent, who stops all in order.

        Raises:
            OSError: the program cannot be run.
        """
        if log.exists() and log.stat().st_size > LOG_LIMIT:
            log.replace(log.with_suffix(".log.1"))
        with log.open("ab") as output:
            popen = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(env),
                cwd=cwd,
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )
        return cls(name, popen, log)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative when a signal ended it."""
        return self._popen.poll()

    def terminate(self) -> None:
        """Asks it to stop; returns at once."""
        with contextlib.suppress(ProcessLookupError):
            self._popen.terminate()

    def wait(self, grace: timedelta) -> bool:
        """Waits for the end of a process that was asked to stop; False when it had to be killed after ``grace``."""
        try:
            self._popen.wait(grace.total_seconds())
            return True
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
            return False

    def stop(self, grace: timedelta) -> bool:
        """Asks it to stop and waits; False when it had to be killed."""
        self.terminate()
        return self.wait(grace)

    def describe_exit(self) -> str:
        """How it ended, for people."""
        code = self.exit_code()
        if code is None:
            return "is running"
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"


def end_with_parent() -> Callable[[], None]:
    """A ``preexec_fn`` after which the kernel kills the child when the thread that forked it ends, however it ends.

    SIGKILL, because only it cannot be outwaited; stores and job leases are made to survive it.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up before the fork: a child may hardly do anything
    parent = os.getpid()

    def tie() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died between fork and prctl
            os._exit(1)

    return tie


def tail(log: Path, lines: int = 20, limit: int = 64 * 1024) -> str:
    """The last lines of a log, from at most its last ``limit`` bytes; empty when there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - limit))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""
