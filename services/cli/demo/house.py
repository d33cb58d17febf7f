"""The demo's stack: it ends with the demo, or is left running to look at."""

from __future__ import annotations

import contextlib
import shlex
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from services.cli.local import gateway, supervisor
from services.cli.local.files import DataFolder, StackInfo
from services.cli.local.stack import Stack
from services.cli.output import err
from services.cli.stack import sign_in
from services.client import Codegraft
from services.core.errors import FailedPrecondition

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class House:
    """What the demo works in."""

    client: Codegraft
    folder: DataFolder
    console: str
    """Address of its pages for people."""

    def tell(self, *, keep: bool) -> None:
        """Prints where the console is, and of a stack that was left running how to sign in and how to stop it."""
        if not keep:
            err.print(f"console: it was at {self.console}; codegraft demo --keep leaves it running")
            return
        folder = shlex.quote(str(self.folder.root))
        err.print(f"console: {self.console}")
        err.print(sign_in(self.folder))
        err.print(f"commands: export CODEGRAFT_DATA={folder}")
        err.print(f"to stop it: codegraft down --data {folder} && rm -r {folder}")


@contextlib.contextmanager
def started(folder: Path, *, keep: bool) -> Iterator[House]:
    """A stack while the block runs.

    Args:
        keep: whether it runs on after a block that succeeds; then it has a supervisor of its own, as that of
            `codegraft up --detach`.

    Raises:
        FailedPrecondition: one runs in the folder already.
    """
    data = DataFolder(folder)
    data.create()
    with _detached(data) if keep else _attached(data) as info, Codegraft.local(folder) as client:
        console = gateway.console(info.processes[gateway.NAME].address)
        err.print(f"console: {console}, while the demo runs; {sign_in(data)}", style="dim")
        yield House(client, data, console)


@contextlib.contextmanager
def _attached(data: DataFolder) -> Iterator[StackInfo]:
    """Its processes are ours, and end with us however we end."""
    if not data.acquire():
        raise _runs(data)
    stack = Stack(data, lambda line: err.print(line, style="dim"))
    try:
        stack.start()
        yield stack.info
    finally:
        with _undisturbed():
            stack.stop()
            data.release()


@contextlib.contextmanager
def _detached(data: DataFolder) -> Iterator[StackInfo]:
    if data.supervisor() is not None:
        raise _runs(data)
    info = supervisor.detach(data)
    try:
        yield info
    except BaseException:
        with _undisturbed():
            supervisor.stop(data)
        raise


def _runs(data: DataFolder) -> FailedPrecondition:
    return FailedPrecondition(f"a stack runs in {data.root} already", hint="Stop it, or choose another --data.")


def heed_signals() -> None:
    """Ctrl-C and SIGTERM end the demo, also where a shell had it ignore them.

    Only the first does: no other is in the way while everything is being ended (make and timeout send two).
    """
    for number in _SIGNALS:
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A signal while everything is being ended would leave something running."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
