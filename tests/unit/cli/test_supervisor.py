"""The supervisor without servers: what a signal does wherever it arrives."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli.local import supervisor
from services.cli.local.files import DataFolder, StackInfo, StackState


class FakeStack:
    """Starts at once, has nothing that could crash, and remembers that it was stopped.

    Like a real one it has a lock taken now and then (Popen has one), which it needs to stop.
    """

    stopped = False
    signalled_while = ""

    def __init__(self, folder: DataFolder, report: object, pause: object) -> None:
        self.info = StackInfo(state=StackState.READY, pid=os.getpid())
        self._lock = threading.Lock()

    def start(self) -> None:
        if self.signalled_while == "start":
            self._signal()

    def check(self) -> list[object]:
        if self.signalled_while == "check":
            self._signal()
        return []

    def stop(self, error: str) -> None:
        FakeStack.stopped = self._lock.acquire(timeout=5)

    def _signal(self) -> None:
        self._lock.acquire()
        os.kill(os.getpid(), signal.SIGTERM)
        sum(range(100))  # the handler runs between two instructions
        self._lock.release()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeStack]]:
    handlers = {number: signal.getsignal(number) for number in supervisor.SIGNALS}
    monkeypatch.setattr(supervisor, "Stack", FakeStack)
    monkeypatch.setattr(FakeStack, "stopped", False)
    yield FakeStack
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("moment", ["start", "check"])
def test_a_signal_stops_the_stack_and_interrupts_nothing_half_way(
    fake: type[FakeStack], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moment: str
) -> None:
    monkeypatch.setattr(fake, "signalled_while", moment)
    signal.alarm(20)  # a signal that is forgotten would let it supervise for ever
    folder = DataFolder(tmp_path / "data")
    folder.create()
    try:
        assert supervisor.run(folder, lambda line: None, lambda info: None) == signal.SIGTERM
    finally:
        signal.alarm(0)
    assert fake.stopped
    assert folder.acquire(), "the folder is free again"
