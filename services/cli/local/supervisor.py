"""The process that owns a local stack from its start to its stop, in the foreground or detached.

python -m services.cli.local.supervisor DATA_FOLDER     what `codegraft up --detach` leaves running
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NoReturn

from services.cli.local.files import DataFolder, ProcessInfo, StackInfo, StackState
from services.cli.local.process import tail
from services.cli.local.stack import GRACE, SERVICES, STARTUP, Report, Stack
from services.core.errors import CodegraftError, FailedPrecondition, Unavailable

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOP_LIMIT = 3 * GRACE
"""Services, S3 and NATS stop one group after the other, each within its grace."""


class StopRequested(Exception):
    """A signal asked the supervisor to stop."""

    def __init__(self, number: int) -> None:
        self.number = number


class StopSignals:
    """Remembers the first signal; whoever waits looks for it. Later ones are only a person's impatience.

    The handler itself raises nothing: wherever it ran it might leave a lock taken (a process's, say, whose end is then
    waited for without end), and the interpreter drops what is raised inside a finalizer or a fork callback.
    """

    def __init__(self) -> None:
        self._number: int | None = None

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def check(self) -> None:
        """Raises StopRequested once a signal came."""
        if self._number is not None:
            raise StopRequested(self._number)

    def pause(self, seconds: float) -> None:
        """Sleeps, unless a signal came before or meanwhile: then it raises StopRequested."""
        self.check()
        time.sleep(seconds)
        self.check()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._number is None:
            self._number = number


def run(folder: DataFolder, report: Report, ready: Callable[[StackInfo], None]) -> int:
    """Owns the stack until a signal or the end of NATS or S3, then stops it. Returns the signal's number, 0 otherwise.

    Args:
        folder: created already.
        report: takes one line for people at a time.
        ready: called once everything serves.

    Raises:
        FailedPrecondition: another supervisor has the folder.
        CodegraftError: the stack did not start, or lost one of its servers; everything is stopped by then.
    """
    if not folder.acquire():
        raise FailedPrecondition(f"a stack runs in {folder.root} already", hint="Stop it with `codegraft down`.")
    signals = StopSignals()
    stack = Stack(folder, report, signals.pause)
    error = ""
    try:
        signals.install()
        stack.start()
        signals.check()
        ready(stack.info)
        _supervise(stack, report, signals)
    except StopRequested as request:
        return request.number
    except CodegraftError as failure:
        error = failure.message
        raise
    finally:
        for number in SIGNALS:  # a second Ctrl-C must not leave half of it running
            signal.signal(number, signal.SIG_IGN)
        stack.stop(error)
        folder.release()


def detach(folder: DataFolder) -> StackInfo:
    """Leaves a supervisor running in the background and returns once everything serves.

    Raises:
        Unavailable: the stack did not start; the message has the tail of the log at fault.
    """
    with folder.log("supervisor").open("wb") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "services.cli.local.supervisor", str(folder.root)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder.root,
            start_new_session=True,
        )
    try:
        info = await_start(folder, lambda: supervisor.poll() is None)
    except KeyboardInterrupt:
        supervisor.terminate()
        supervisor.wait(STOP_LIMIT.total_seconds())
        raise
    if info.state is StackState.READY:
        return info
    error = info.error if info.pid == supervisor.pid else ""
    raise Unavailable(
        error or f"the stack did not start\n{tail(folder.log('supervisor'))}", hint=f"The logs are in {folder.logs}."
    )


def await_start(folder: DataFolder, alive: Callable[[], bool]) -> StackInfo:
    """What runs, once it no longer starts: ready, or failed when the supervisor is no longer alive."""
    deadline = time.monotonic() + (STARTUP + timedelta(seconds=30)).total_seconds()
    while alive() and time.monotonic() < deadline:
        info = folder.info()
        if info.state is StackState.READY:
            return info
        time.sleep(0.05)
    return folder.info()


def stop(folder: DataFolder) -> bool:
    """Asks the folder's supervisor to stop everything and waits for it; False when nothing ran.

    Raises:
        Unavailable: it still runs after the time in which every process is stopped or killed.
    """
    pid = folder.supervisor()
    if pid is None:
        return False
    deadline = time.monotonic() + STOP_LIMIT.total_seconds()
    asked = False
    while (pid := folder.supervisor()) is not None:
        if not asked and pid and folder.info().pid == pid:  # both files agree: this is the one, not one before it
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            asked = True
        if time.monotonic() > deadline:
            raise Unavailable(f"the stack's supervisor (process {pid}) does not stop", hint=f"See {folder.logs}.")
        time.sleep(0.05)
    return True


def _supervise(stack: Stack, report: Report, signals: StopSignals) -> NoReturn:
    while True:
        for process in stack.check():
            _tell(process, report)
            if process.name not in SERVICES:
                raise Unavailable(
                    f"{process.name} {process.crash}; nothing works without it", hint=f"Its whole log is {process.log}."
                )
        signals.pause(0.2)


def _tell(process: ProcessInfo, report: Report) -> None:
    report(f"{process.name} {process.crash}; the end of {process.log}:\n{tail(Path(process.log))}")


def main() -> int:
    """Entry point of the detached supervisor."""

    def report(line: str) -> None:
        print(line, flush=True)

    try:
        run(DataFolder(Path(sys.argv[1])), report, lambda info: None)
    except CodegraftError as error:
        report(error.message)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
