"""Starts, watches and stops the processes of a local stack: NATS, S3, then the services and the gateway."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

from services.cli.local import gateway, nats, permissions, ports, s3
from services.cli.local.files import Credentials, DataFolder, ProcessInfo, StackInfo, StackState
from services.cli.local.process import Child, tail
from services.core.errors import Unavailable
from services.core.rpc import probe

BEHIND = tuple(permissions.SERVICES)
"""Those that speak gRPC."""
SERVICES = (*BEHIND, gateway.NAME)
STARTUP = timedelta(seconds=60)
DRAIN = timedelta(seconds=5)
"""How long a stopping service lets running calls end."""
GRACE = DRAIN + timedelta(seconds=5)
"""After that long a service that was asked to stop is killed."""
BUCKET = "codegraft"
PORT_TRIES = 3
PORT_TAKEN = ("ddress already in use", "cannot listen on", "address in use", "Port allocation failed")
"""What the programs say of it; the last one is the S3 server."""

Report = Callable[[str], None]


class Stack:
    """The processes of one data folder. The caller holds the folder's lock.

    Args:
        pause: sleeps that many seconds; called while something starts, and what it raises ends the start.
    """

    def __init__(self, folder: DataFolder, report: Report, pause: Callable[[float], None] = time.sleep) -> None:
        self._folder = folder
        self._report = report
        self._pause = pause
        self._children: dict[str, Child] = {}
        self.info = StackInfo(StackState.STARTING, os.getpid())

    def start(self) -> None:
        """Returns once every service serves. What was started before a failure is left for :meth:`stop`.

        Raises:
            CodegraftError: a process could not be started, ended by itself, or is not healthy in time.
        """
        began = time.monotonic()
        remembered = self._folder.ports()
        for attempt in range(PORT_TRIES):
            try:
                self._start_all(remembered)
                break
            except Unavailable as error:
                # Between choosing a port and listening on it another process may take it.
                if attempt == PORT_TRIES - 1 or not any(sign in error.message for sign in PORT_TAKEN):
                    raise
            self._report("another process took a port meanwhile, starting again on others")
            self.stop()
            self._children, self.info = {}, StackInfo(StackState.STARTING, os.getpid())
            remembered = {}
        self.info.state = StackState.READY
        self._folder.describe(self.info)
        self._report(f"everything is up after {time.monotonic() - began:.1f} s")

    def _start_all(self, remembered: Mapping[str, int]) -> None:
        self._folder.describe(self.info)
        wanted = ["nats", "s3", *SERVICES, *(_figures(name) for name in SERVICES)]
        chosen = ports.choose(wanted, dict(remembered))
        self._folder.remember(chosen)
        credentials = self._folder.credentials()
        addresses = {name: f"{ports.HOST}:{port}" for name, port in chosen.items()}
        self._adopt(
            nats.start(
                self._folder.root / "nats",
                log=self._folder.log("nats"),
                port=chosen["nats"],
                user=credentials.nats_user,
                password=credentials.nats_password,
                services={name: each.nats_password for name, each in credentials.services.items()},
                pause=self._pause,
            ),
            addresses["nats"],
        )
        self._adopt(
            s3.start(
                self._folder.root / "s3",
                log=self._folder.log("s3"),
                port=chosen["s3"],
                access_key=credentials.s3_access_key,
                secret_key=credentials.s3_secret_key,
                bucket=BUCKET,
                services={
                    name: (each.s3_access_key, each.s3_secret_key) for name, each in credentials.services.items()
                },
                pause=self._pause,
            ),
            addresses["s3"],
        )
        own = {
            "ingest": {
                "CODEGRAFT_INGEST_CREDENTIAL_KEYS": json.dumps([credentials.ingest_key]),
                "CODEGRAFT_INGEST_SEED_KEYS": json.dumps(seeds(credentials)),
            }
        }
        for name in SERVICES:
            environment = (
                gateway.environment(os.environ, {each: addresses[each] for each in SERVICES}, credentials.console_key)
                if name == gateway.NAME
                else {**service_environment(os.environ, addresses, credentials, name), **own.get(name, {})}
            )
            environment["CODEGRAFT_METRICS_LISTEN"] = addresses[_figures(name)]
            self._adopt(
                Child.start(
                    name,
                    [sys.executable, "-m", f"services.{name}"],
                    log=self._folder.log(name),
                    env=environment,
                    cwd=self._folder.root,  # not the caller's folder: it may have a package of the name `services`
                ),
                addresses[name],
                f"http://{addresses[_figures(name)]}/metrics",
            )
        self._await_health(addresses)

    def check(self) -> list[ProcessInfo]:
        """The processes that ended by themselves since the last look."""
        crashed = []
        for name, child in self._children.items():
            process = self.info.processes[name]
            if child.exit_code() is not None and not process.crash:
                process.crash = child.describe_exit()
                crashed.append(process)
        if crashed:
            self._folder.describe(self.info)
        return crashed

    def stop(self, error: str = "") -> None:
        """Stops everything in reverse order: the services together, then S3, then NATS. Does not raise.

        Args:
            error: why, when it is a failure; kept for ``status``.
        """
        self.info.state = StackState.STOPPING
        self._folder.describe(self.info)
        services = [self._children[name] for name in reversed(SERVICES) if name in self._children]
        for child in services:
            child.terminate()
        for child in services:
            self._ended(child, child.wait(GRACE), GRACE)
        for name, grace in (("s3", s3.GRACE), ("nats", nats.GRACE)):
            if name in self._children:
                self._ended(self._children[name], self._children[name].stop(grace), grace)
        self._folder.describe(StackInfo(StackState.FAILED if error else StackState.STOPPED, self.info.pid, error=error))

    def _ended(self, child: Child, in_time: bool, grace: timedelta) -> None:
        if not in_time:
            self._report(f"{child.name} did not stop within {grace.total_seconds():.0f} s and was killed")

    def _adopt(self, child: Child, address: str, metrics: str = "") -> None:
        self._children[child.name] = child
        self.info.processes[child.name] = ProcessInfo(child.name, child.pid, address, str(child.log), metrics=metrics)
        self._folder.describe(self.info)

    def _await_health(self, addresses: Mapping[str, str]) -> None:
        deadline = time.monotonic() + STARTUP.total_seconds()
        waiting = list(SERVICES)
        while waiting:
            for process in self.check():
                raise Unavailable(
                    f"{process.name} {process.crash} while starting\n{tail(self._children[process.name].log)}",
                    hint=f"Its whole log is {process.log}.",
                )
            for name in list(waiting):
                if check(name, addresses[name], timedelta(milliseconds=500)) == probe.SERVING:
                    waiting.remove(name)
                    where = gateway.url(addresses[name]) if name == gateway.NAME else addresses[name]
                    self._report(f"{name} serves on {where}")
            if waiting and time.monotonic() > deadline:
                child = self._children[waiting[0]]
                raise Unavailable(
                    f"{child.name} is not healthy after {STARTUP.total_seconds():.0f} s\n{tail(child.log)}",
                    hint=f"Its whole log is {child.log}.",
                )
            self._pause(0.05)


def _figures(service: str) -> str:
    """What the port of a service's figures is remembered by."""
    return f"{service}-metrics"


def seeds(credentials: Credentials) -> list[dict[str, str]]:
    """The API keys that are there from the start: the operator's, and of the services that call others."""
    keys = [{"key": credentials.api_key, "role": "operator"}]
    return keys + [
        {"key": credentials.services[name].api_key, "role": role} for name, role in permissions.CALLS.items()
    ]


def check(name: str, address: str, timeout: timedelta = timedelta(seconds=2)) -> str:
    """A service's health as a word."""
    return (gateway.check if name == gateway.NAME else probe.check)(address, timeout)


def waiting(service: str) -> dict[str, str]:
    """How a service's threads wait for each other, where several compute on the same cores: passively, or one that
    spins would stall the others. The engine's for some 30 microseconds actively, which gets it from one product to the
    next; it takes fewer threads itself when it has not all cores."""
    return {"GOMP_SPINCOUNT": "10000"} if service == "inference" else {"OMP_WAIT_POLICY": "PASSIVE"}


def service_environment(
    base: Mapping[str, str], addresses: Mapping[str, str], credentials: Credentials, service: str
) -> dict[str, str]:
    """What a service finds in its environment: the caller's own settings, with the stack's over them."""
    own = credentials.services[service]
    return {
        **waiting(service),
        **{name: value for name, value in base.items() if not name.startswith(("CODEGRAFT_TLS_", "CODEGRAFT_NATS_"))},
        "CODEGRAFT_LISTEN": addresses[service],
        "CODEGRAFT_AUTH": "on",
        "CODEGRAFT_API_KEY": own.api_key if service in permissions.CALLS else "",
        "CODEGRAFT_NATS_URL": f"nats://{addresses['nats']}",
        "CODEGRAFT_NATS_USER": service,
        "CODEGRAFT_NATS_PASSWORD": own.nats_password,
        "CODEGRAFT_S3_ENDPOINT": addresses["s3"],
        "CODEGRAFT_S3_ACCESS_KEY": own.s3_access_key,
        "CODEGRAFT_S3_SECRET_KEY": own.s3_secret_key,
        "CODEGRAFT_S3_BUCKET": BUCKET,
        "CODEGRAFT_S3_SECURE": "false",
        "CODEGRAFT_DRAIN_SECONDS": f"{DRAIN.total_seconds():.0f}",
        **{f"CODEGRAFT_{name.upper()}_ADDRESS": addresses[name] for name in BEHIND},
    }
