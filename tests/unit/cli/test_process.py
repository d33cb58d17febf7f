"""Child processes: stopped in time, ended with their parent, and honest about how they ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from services.cli.local import process
from services.cli.local.process import Child, tail

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
]


def start(argv: list[str], log: Path) -> Child:
    child = Child.start("child", argv, log=log, env=os.environ)
    until(lambda: "up" in tail(log))
    return child


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_stop_asks_first(tmp_path: Path) -> None:
    child = start(SLEEP, tmp_path / "child.log")
    assert child.exit_code() is None
    assert child.describe_exit() == "is running"
    assert child.stop(timedelta(seconds=10))
    assert child.describe_exit() == "was ended by SIGTERM"


def test_stop_kills_what_does_not_listen(tmp_path: Path) -> None:
    child = start(STUBBORN, tmp_path / "child.log")
    assert not child.stop(timedelta(milliseconds=200))
    assert child.describe_exit() == "was ended by SIGKILL"


def test_exit_code_is_told(tmp_path: Path) -> None:
    child = Child.start("child", [sys.executable, "-c", "raise SystemExit(3)"], log=tmp_path / "l.log", env=os.environ)
    until(lambda: child.exit_code() is not None)
    assert child.describe_exit() == "ended with exit code 3"
    child.terminate()


def test_children_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, time; from pathlib import Path\n"
        "from services.cli.local.process import Child, tail\n"
        "log = Path(sys.argv[1])\n"
        f"child = Child.start('child', {STUBBORN!r}, log=log, env=os.environ)\n"
        "while 'up' not in tail(log): time.sleep(0.02)\n"
        "print(child.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    log = tmp_path / "child.log"
    parent = subprocess.run([sys.executable, "-c", script, str(log)], stdout=subprocess.PIPE, check=False)
    assert parent.returncode == -9
    pid = int(parent.stdout)
    until(lambda: not is_alive(pid))


def test_tail_gives_the_last_lines_only(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    assert tail(log) == ""
    log.write_text("\n".join(f"line {number}" for number in range(1000)))
    assert tail(log, lines=2) == "line 998\nline 999"
    assert tail(log, lines=1000, limit=20).endswith("line 999")
    assert len(tail(log, lines=1000, limit=20)) <= 20


def test_a_long_log_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LOG_LIMIT", 10)
    log = tmp_path / "child.log"
    log.write_text("x" * 11)
    start(SLEEP, log).stop(timedelta(seconds=10))
    assert log.read_text() == "up\n"
    assert (tmp_path / "child.log.1").read_text() == "x" * 11
