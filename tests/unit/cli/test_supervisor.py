"""The supervisor without servers: what a signal does wherever it arrives."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli.local import supervisor
from services.cli.local.files import DataFolder, StackInfo, StackState


class SignalledInFinalizer:
    """The interpreter reports and drops what a signal handler raises in here."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        sum(range(100))  # the handler runs between two instructions


class FakeStack:
    """Starts at once, has nothing that could crash, and remembers that it was stopped."""

    stopped = False
    signalled_while = ""

    def __init__(self, folder: DataFolder, report: object) -> None:
        self.info = StackInfo(state=StackState.READY, pid=os.getpid())

    def start(self) -> None:
        if self.signalled_while == "start":
            SignalledInFinalizer()

    def check(self) -> list[object]:
        if self.signalled_while == "check":
            SignalledInFinalizer()
        return []

    def stop(self, error: str) -> None:
        FakeStack.stopped = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeStack]]:
    handlers = {number: signal.getsignal(number) for number in supervisor.SIGNALS}
    monkeypatch.setattr(supervisor, "Stack", FakeStack)
    monkeypatch.setattr(FakeStack, "stopped", False)
    yield FakeStack
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("moment", ["start", "check"])
def test_a_signal_whose_exception_is_lost_still_stops_the_stack(
    fake: type[FakeStack], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moment: str
) -> None:
    monkeypatch.setattr(fake, "signalled_while", moment)
    signal.alarm(20)  # without the second look it would supervise for ever
    folder = DataFolder(tmp_path / "data")
    folder.create()
    try:
        assert supervisor.run(folder, lambda line: None, lambda info: None) == signal.SIGTERM
    finally:
        signal.alarm(0)
    assert fake.stopped
    assert folder.acquire(), "the folder is free again"
