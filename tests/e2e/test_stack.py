"""The local stack as a user has it: the real command, the real servers, real signals."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

CODEGRAFT = [sys.executable, "-m", "services.cli.main"]
NAMES = {"nats", "s3", "ingest", "scanner", "trainer", "inference", "gateway"}


def codegraft(*arguments: str, data: Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*CODEGRAFT, *arguments, "--data", str(data)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == expect, f"{arguments} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done


def up(data: Path) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(codegraft("up", "--detach", "--json", data=data).stdout)
    return described


def processes(described: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {process["name"]: process for process in [*described["servers"], *described["services"]]}


def tree(pid: int) -> list[psutil.Process]:
    """The process and everything below it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def is_loopback(address: str) -> bool:
    """Also of gRPC's IPv4 addresses in IPv6 clothes."""
    ip = ipaddress.ip_address(address)
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def assert_gone(known: list[psutil.Process]) -> None:
    gone, alive = psutil.wait_procs(known, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE], f"still running: {alive}"
    assert gone or known


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "data"
    yield folder
    codegraft("down", data=folder)


def test_up_status_restart_down(data: Path) -> None:
    began = time.monotonic()
    first = up(data)
    print(f"cold start: {time.monotonic() - began:.1f} s")
    assert first["state"] == "ready"
    assert processes(first).keys() == NAMES
    assert {service["state"] for service in first["services"]} == {"serving"}

    for service in first["services"]:
        figures = urllib.request.urlopen(service["metrics"], timeout=10).read().decode()
        assert f'codegraft_service_info{{service="{service["name"]}"' in figures

    supervisor = int((data / "lock").read_text())
    everything = tree(supervisor)
    assert {process["pid"] for process in processes(first).values()} <= {process.pid for process in everything}
    for process in everything:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                assert is_loopback(connection.laddr.ip), f"{process} listens on {connection.laddr}"
        secret = json.loads((data / "credentials.json").read_text())
        services = [value for each in secret["services"].values() for value in each.values()]
        own = ("nats_password", "s3_secret_key", "api_key", "console_key")
        for value in (*(secret[name] for name in own), *services):
            assert value not in " ".join(process.cmdline()), "a secret on a command line is a secret in `ps`"
    assert stat.S_IMODE((data / "credentials.json").stat().st_mode) == 0o600

    again = codegraft("up", "--json", data=data)
    assert "runs already" in again.stderr
    assert json.loads(again.stdout) == first
    assert json.loads(codegraft("status", "--json", data=data).stdout) == first

    environment = {**os.environ, "CODEGRAFT_DATA": str(data)}
    create = [*CODEGRAFT, "project", "create", "acme", "--json"]
    stranger = {**environment, "CODEGRAFT_API_KEY": "cg_local_" + "x" * 43}
    assert subprocess.run(create, env=stranger, timeout=60, check=False).returncode == 6, "authentication is on"
    assert subprocess.run(create, env=environment, timeout=60, check=False).returncode == 0

    told = codegraft("console", data=data)
    assert told.stdout.strip() == first["console"] and "codegraft console --key --data" in told.stderr
    key = codegraft("console", "--key", data=data).stdout.strip()
    assert key == secret["api_key"] and key not in told.stdout + told.stderr
    browser = httpx2.Client(timeout=20)
    page = browser.get(f"{told.stdout.strip()}/login")
    form = {"key": key, "csrf": re.findall(r'name="csrf" value="([^"]+)"', page.text)[0]}
    assert browser.post(str(page.url), data=form).status_code == 303
    assert browser.get(told.stdout.strip()).status_code == 200, "signed in"
    checks = json.loads(codegraft("doctor", "--json", data=data).stdout)
    found = {check["name"]: check["found"] for check in checks if check["name"] not in {"memory", "disk"}}
    assert not [check for check in checks if check["result"] != "ok" and check["name"] in found]
    assert found["API key"] == "keys/local: operator" and found["NATS as inference"] and found["versions"]
    codegraft("backup", str(data.parent / "backup.tar.gz"), data=data)

    codegraft("down", data=data)
    assert_gone(everything)
    codegraft("restore", str(data.parent / "backup.tar.gz"), data=data, expect=5)
    codegraft("status", data=data, expect=5)
    codegraft("console", data=data, expect=5)
    assert "no stack runs" in codegraft("down", data=data).stderr

    second = up(data)
    assert {name: p["address"] for name, p in processes(second).items()} == {
        name: p["address"] for name, p in processes(first).items()
    }
    assert browser.get(first["console"]).status_code == 200, "a restart signs nobody out"
    assert not [log for log in (data / "logs").iterdir() if key in log.read_text(errors="replace")]
    listed = subprocess.run(
        [*CODEGRAFT, "project", "list", "--json"], env=environment, timeout=60, check=True, capture_output=True
    )
    assert [project["name"] for project in json.loads(listed.stdout)] == ["projects/acme"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_stops_the_foreground_stack(data: Path, number: signal.Signals, code: int) -> None:
    foreground = subprocess.Popen([*CODEGRAFT, "up", "--data", str(data)], stderr=subprocess.PIPE, text=True)
    assert foreground.stderr
    lines = []
    for line in foreground.stderr:
        lines.append(line)
        if "Ctrl-C" in line:
            break
    everything = tree(foreground.pid)
    assert len(everything) >= 1 + len(NAMES), "".join(lines)
    foreground.send_signal(number)
    foreground.send_signal(number)  # the impatient user's second one changes nothing
    assert foreground.wait(60) == code
    assert_gone(everything)


def test_a_signal_while_starting_leaves_nothing(data: Path) -> None:
    foreground = subprocess.Popen([*CODEGRAFT, "up", "--data", str(data)])
    until(lambda: len(tree(foreground.pid)) > 3)
    everything = tree(foreground.pid)
    foreground.send_signal(signal.SIGINT)
    assert foreground.wait(60) == 130
    assert_gone(everything)


def test_a_killed_supervisor_leaves_no_child_and_no_damage(data: Path) -> None:
    up(data)
    everything = tree(int((data / "lock").read_text()))
    everything[0].kill()
    assert_gone(everything)
    codegraft("status", data=data, expect=5)
    again = up(data)
    assert again["state"] == "ready"
    _a_crashed_service_is_told_and_the_rest_goes_on(data, again)


def _a_crashed_service_is_told_and_the_rest_goes_on(data: Path, described: dict[str, Any]) -> None:
    os.kill(processes(described)["trainer"]["pid"], signal.SIGKILL)
    until(lambda: "trainer was ended by SIGKILL; the end of" in (data / "logs" / "supervisor.log").read_text())
    told = processes(json.loads(codegraft("status", "--json", data=data, expect=5).stdout))
    assert "SIGKILL" in told["trainer"]["state"]
    assert {told[name]["state"] for name in NAMES - {"trainer"}} == {"running", "serving"}, "the rest goes on"


def test_a_service_that_cannot_start_shows_its_log(data: Path) -> None:
    environment = {**os.environ, "CODEGRAFT_LOG_LEVEL": "nonsense"}
    command = [*CODEGRAFT, "up", "--detach", "--data", str(data)]
    failed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert failed.returncode == 5, failed.stderr
    assert "CODEGRAFT_LOG_LEVEL" in failed.stderr, "the tail of the log names the setting at fault"
    assert "Traceback" not in failed.stderr
    codegraft("status", data=data, expect=5)
