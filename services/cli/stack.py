"""``codegraft up``, ``down``, ``status`` and ``console``: the local stack."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from services.cli.local import gateway, supervisor
from services.cli.local.files import DataFolder, StackInfo, StackState
from services.cli.local.stack import SERVICES, check
from services.cli.output import ExitCode, Json, err, out, print_json, print_table
from services.client.addresses import default_data
from services.core.errors import Unavailable
from services.core.rpc import probe

Data = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Data folder of the stack.", envvar="CODEGRAFT_DATA", show_default="~/.local/share/codegraft"
    ),
]


def up(
    data: Data = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once everything serves.")] = False,
    json: Json = False,
) -> None:
    """Start NATS, S3, the four services and the gateway on this machine, on loopback.

    Everything is kept in the data folder: a restart continues where the last one stopped, on the same addresses where
    possible. Without --detach it runs until Ctrl-C. When the stack runs already, says so and does nothing.
    """
    folder = DataFolder(data or default_data())
    folder.create()
    if folder.supervisor() is not None:
        info = supervisor.await_start(folder, lambda: folder.supervisor() is not None)
        if info.state is StackState.READY:
            err.print(f"the stack runs already, in {folder.root}")
            _show(folder, info, json)
            return
    if detach:
        _show(folder, supervisor.detach(folder), json)
        return
    number = supervisor.run(folder, err.print, lambda info: _announce(folder, info, json))
    raise typer.Exit(ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.OK)


def down(data: Data = None, json: Json = False) -> None:
    """Stop the stack; what it stored stays. Services finish their running calls first."""
    folder = DataFolder(data or default_data())
    stopped = supervisor.stop(folder)
    if json:
        print_json({"stopped": stopped, "data": str(folder.root)})
    else:
        err.print(f"stopped the stack in {folder.root}" if stopped else f"no stack runs in {folder.root}")


def status(data: Data = None, json: Json = False) -> None:
    """Show what runs and whether it is healthy. Exits with 5 unless everything is."""
    folder = DataFolder(data or default_data())
    info = folder.info()
    healthy = _show(folder, info, json)
    if not healthy:
        raise typer.Exit(ExitCode.UNAVAILABLE)


def console(
    data: Data = None,
    key: Annotated[bool, typer.Option("--key", help="Print the key to sign in with, and nothing else.")] = False,
    json: Json = False,
) -> None:
    """Say where the stack's console is, the pages for people, and how to sign in.

    One signs in with an API key: the stack's operator has one in its data folder, others get theirs with
    `codegraft key create`. Without --key no secret is printed.

    Example: codegraft console --key | xclip -selection clipboard
    """
    folder = DataFolder(data or default_data())
    info = folder.info()
    if gateway.NAME not in info.processes:
        raise Unavailable(f"no stack runs in {folder.root}", hint="Start it: codegraft up --detach")
    if key:
        out.print(folder.credentials().api_key)
    elif json:
        print_json({"url": _console(info), "credentials": str(folder.secrets)})
    else:
        out.print(_console(info))
        err.print(sign_in(folder))


def sign_in(folder: DataFolder) -> str:
    """How one gets the key for the console, for people; the key itself belongs on no screen and in no log."""
    chosen = "" if folder.root == default_data() else f" --data {shlex.quote(str(folder.root))}"
    return f"to sign in: codegraft console --key{chosen}   (api_key in {folder.secrets})"


def _console(info: StackInfo) -> str:
    return gateway.console(info.processes[gateway.NAME].address)


def _announce(folder: DataFolder, info: StackInfo, as_json: bool) -> None:
    _show(folder, info, as_json)
    if not as_json:
        err.print("Ctrl-C stops it")


def _show(folder: DataFolder, info: StackInfo, as_json: bool) -> bool:
    """Prints what runs; True when the stack is ready and every process is well."""
    states = {name: _state(info, name) for name in info.processes}
    healthy = info.state is StackState.READY and all(state in {"running", probe.SERVING} for state in states.values())
    if as_json:
        print_json(describe(folder, info, states))
        return healthy
    err.print(f"{info.state.value}; data in {folder.root}, logs in {folder.logs}")
    if info.error:
        err.print(info.error)
    if info.processes:
        rows = [[p.name, states[p.name], p.address, str(p.pid)] for p in info.processes.values()]
        print_table(["NAME", "STATE", "ADDRESS", "PID"], rows, empty="")
    if healthy:
        err.print(f"for editors: {gateway.url(info.processes[gateway.NAME].address)}/v1 (OpenAI), …/infill (llama.cpp)")
        err.print(f"for people: {_console(info)}")
        err.print(sign_in(folder))
    return healthy


def describe(folder: DataFolder, info: StackInfo, states: dict[str, str]) -> dict[str, Any]:
    """What ``--json`` prints: the services and, apart from them, the servers they stand on."""
    described = [
        {
            "name": p.name,
            "state": states[p.name],
            "address": p.address,
            "pid": p.pid,
            "log": p.log,
            "metrics": p.metrics,
        }
        for p in info.processes.values()
    ]
    return {
        "state": info.state.value,
        "data": os.fspath(folder.root),
        "error": info.error,
        "console": _console(info) if gateway.NAME in info.processes else "",
        "servers": [process for process in described if process["name"] not in SERVICES],
        "services": [process for process in described if process["name"] in SERVICES],
    }


def _state(info: StackInfo, name: str) -> str:
    process = info.processes[name]
    if process.crash:
        return process.crash
    return check(name, process.address) if name in SERVICES else "running"
