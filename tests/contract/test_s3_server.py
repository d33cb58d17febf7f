"""The local S3 server: keeps its objects over restarts and kills, and lets nobody in without its keys."""

from __future__ import annotations

import http.server
import json
import os
import socket
import stat
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import urllib3

from services.cli.local import ports, s3
from services.cli.local.process import Child
from services.cli.local.stack import PORT_TAKEN
from services.core import errors
from services.core.store import S3Store
from services.core.store.s3 import S3Address
from tests.conftest import AT_ONCE

ACCESS, SECRET = "AKLOCALTEST", "a-secret-of-this-test"


def launch(folder: Path, port: int, **options: timedelta) -> Child:
    return s3.start(folder / "data", log=folder / "log", port=port, access_key=ACCESS, secret_key=SECRET, **options)


def free_port() -> int:
    return ports.choose(["s3"], {})["s3"]


async def test_objects_outlive_a_restart_and_a_kill(tmp_path: Path) -> None:
    for generation in range(3):
        port = free_port()  # another one each time
        server = launch(tmp_path, port)
        try:
            store = S3Store(S3Address(f"127.0.0.1:{port}", "codegraft", ACCESS, SECRET))
            await store.prepare()
            for earlier in range(generation):
                assert await store.get(f"from/{earlier}") == bytes([earlier]) * 100_000
            assert await store.put("if-absent", b"", if_absent=True) is (generation == 0)
            await store.put(f"from/{generation}", bytes([generation]) * 100_000)
            store.close()
        finally:
            if generation == 1:
                os.kill(server.pid, 9)
            server.stop(s3.GRACE)


@pytest.mark.parametrize("own", [True, False], ids=["its own", "an inner one"])
def test_a_port_that_another_took_meanwhile_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    port = free_port()
    monkeypatch.setattr(ports, "is_free", lambda port: True)
    with socket.create_server((ports.HOST, 0)) as other:
        taken = other.getsockname()[1]
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "ports.json").write_text(json.dumps({} if own else {"master": taken}))
        with pytest.raises(errors.Unavailable) as caught:
            launch(tmp_path, taken if own else port)
    assert any(sign in caught.value.message for sign in PORT_TAKEN), caught.value.message


def test_it_is_closed_without_keys_and_listens_on_loopback_only(tmp_path: Path) -> None:
    port = free_port()
    server = launch(tmp_path, port)
    web = urllib3.PoolManager(retries=False, timeout=2)
    try:
        listening = _listening(server.pid)
        assert port in {number for _host, number in listening}
        assert {host for host, _number in listening} == {"127.0.0.1"}
        assert web.request("GET", f"http://127.0.0.1:{port}/codegraft", timeout=20).status == 403
        assert web.request("PUT", f"http://127.0.0.1:{port}/codegraft/x", body=b"x", timeout=20).status == 403
        for _host, number in sorted(listening):
            for path in ("/buckets/codegraft/", "/1,0123456789"):  # a filer's listing, a volume's needle
                try:
                    response = web.request("GET", f"http://127.0.0.1:{number}{path}", redirect=False)
                except urllib3.exceptions.HTTPError:
                    continue  # gRPC
                assert response.status in {301, 400, 401, 403, 404}, (number, path, response.data[:200])
        assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
        arguments = Path(f"/proc/{server.pid}/cmdline").read_bytes()
        assert SECRET.encode() not in arguments
        assert SECRET not in (tmp_path / "log").read_text(errors="replace")
    finally:
        web.clear()
        server.stop(AT_ONCE)


def test_a_port_of_another_server_is_noticed(tmp_path: Path) -> None:
    """Even one that says yes to everything, as an S3 server without keys would."""

    class Yes(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_PUT = do_GET

        def log_message(self, *_args: object) -> None: ...

    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Yes)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        with pytest.raises(errors.Unavailable, match="local S3 server"):
            launch(tmp_path, other.server_address[1], timeout=timedelta(seconds=3))
    finally:
        other.shutdown()
        other.server_close()


def test_a_program_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3.sysconfig, "get_path", lambda _name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(errors.FailedPrecondition, match="not installed") as raised:
        launch(tmp_path, free_port())
    assert "pip install" in raised.value.hint


def _listening(pid: int) -> set[tuple[str, int]]:
    """Addresses on which the process listens, from /proc."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                packed = b"".join(bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8))
                found.add((socket.inet_ntop(family, packed), int(port, 16)))
    return found
