"""The demo's stack ends with the demo, or outlives one that succeeded."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.cli.demo import house
from services.cli.local.files import DataFolder, ProcessInfo, StackInfo, StackState
from services.core.errors import FailedPrecondition

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GATEWAY = {"gateway": ProcessInfo("gateway", 1, "127.0.0.1:1", "log")}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was done, with nothing started."""
    done: list[str] = []

    class Stack:
        info = StackInfo(StackState.READY, processes=GATEWAY)

        def __init__(self, folder: DataFolder, report: Any) -> None: ...
        def start(self) -> None:
            done.append("start")

        def stop(self) -> None:
            done.append("stop")

    def detach(folder: DataFolder) -> StackInfo:
        done.append("detach")
        return Stack.info

    local = SimpleNamespace(local=lambda folder: contextlib.nullcontext(None))
    monkeypatch.setattr(house, "Stack", Stack)
    monkeypatch.setattr(house, "Codegraft", local)
    monkeypatch.setattr(house.supervisor, "detach", detach)
    monkeypatch.setattr(house.supervisor, "stop", lambda folder: done.append("down"))
    monkeypatch.setattr(house.err, "print", lambda text, **style: done.append(text))
    yield done


@pytest.fixture
def heeded() -> Iterator[None]:
    """Signals are heeded as in a demo."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    house.heed_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_it_ends_with_the_demo(said: list[str], tmp_path: Path) -> None:
    with house.started(tmp_path, keep=False) as there:
        assert there.console == "http://127.0.0.1:1/console"
    there.tell(keep=False)
    assert (said[0], said[2]) == ("start", "stop") and "--keep" in said[3]
    with pytest.raises(KeyboardInterrupt), house.started(tmp_path, keep=False):
        raise KeyboardInterrupt
    assert said[-1] == "stop" and DataFolder(tmp_path).supervisor() is None


def test_it_outlives_a_demo_that_was_asked_to_keep_it(said: list[str], tmp_path: Path) -> None:
    with house.started(tmp_path, keep=True) as there:
        pass
    assert said[0] == "detach" and not {"stop", "down"} & {*said}
    there.tell(keep=True)
    text = "\n".join(said)
    assert f"codegraft down --data {tmp_path}" in text and "codegraft console --key" in text
    secret = DataFolder(tmp_path).credentials()
    assert secret.api_key not in text and secret.console_key not in text


def test_one_that_fails_leaves_nothing_running(said: list[str], tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition), house.started(tmp_path, keep=True):
        raise FailedPrecondition("no checkpoint beat the base model")
    assert said[-1] == "down"


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("again", SIGNALS)
@pytest.mark.usefixtures("heeded")
def test_a_second_signal_is_not_in_the_way(
    said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: signal.Signals, again: signal.Signals
) -> None:
    @contextlib.contextmanager
    def client(folder: Path) -> Iterator[None]:
        try:
            yield
        finally:
            signal.raise_signal(again)
            said.append("closed")

    monkeypatch.setattr(house, "Codegraft", SimpleNamespace(local=client))
    with pytest.raises(KeyboardInterrupt), house.started(tmp_path, keep=False):
        signal.raise_signal(first)
    assert said[-2:] == ["closed", "stop"]


@pytest.mark.usefixtures("heeded")
def test_what_is_being_ended_is_ended(said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(stack: Any) -> None:
        for number in SIGNALS:
            signal.raise_signal(number)
        said.append("stop")

    monkeypatch.setattr(house.Stack, "stop", stop)
    with house.started(tmp_path, keep=False):
        pass
    assert said[-1] == "stop"
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
