"""Real servers for the tests, started once a session on loopback with credentials of their own."""

from __future__ import annotations

import gc
import logging
import os
import secrets
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, settings
from pydantic import SecretStr

from services.cli.local import nats, ports, s3
from services.cli.local.process import Child
from services.core.config import CoreSettings
from services.core.store.s3 import S3Address
from tests.order import OneComputes

# A machine that stands still for a moment makes no example wrong, which hypothesis would have ended after 200 ms, and
# no strategy unfit, which it says of one that has made too few within a second.
settings.register_profile("whatever the machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("whatever the machine")
# Services that tests start by themselves take calls from everybody; those of `codegraft up` do not, whatever this says.
os.environ["CODEGRAFT_AUTH"] = "off"
# Those who scan and train give way to whoever completes. Here they would give way to the other workers' tests, too.
os.environ["CODEGRAFT_SCANNER_NICE"] = os.environ["CODEGRAFT_TRAINER_NICE"] = "0"
# Two workers that choose ports at the same moment would sometimes choose the same.
_number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_each = len(ports.RANGE) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
ports.RANGE = ports.RANGE[_number * _each :][:_each]

AT_ONCE = timedelta()
"""The grace of a server whose data nobody wants again: to stop by itself takes the S3 server seconds."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneComputes | None:
    """Workers that share files have them in an order of our own."""
    return OneComputes(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_finish() -> None:
    """What all the tests import stays to the end: without this each look for garbage goes through it, for a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def own_logs() -> Iterator[None]:
    """What a command sets of the logs of this process is taken back at the end."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    structlog.reset_defaults()
    root.handlers = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Address]:
    """A real S3 server (SeaweedFS) with an empty bucket."""
    folder = tmp_path_factory.mktemp("s3")
    port = ports.choose(["s3"], {})["s3"]
    address = S3Address(f"{ports.HOST}:{port}", "codegraft", secrets.token_hex(10), secrets.token_urlsafe(32))
    server = s3.start(
        folder / "data",
        log=folder / "log",
        port=port,
        access_key=address.access_key,
        secret_key=address.secret_key,
        bucket=address.bucket,
    )
    yield address
    server.stop(AT_ONCE)


@dataclass
class S3Server:
    """A real S3 server in a folder of its own; can be killed, and started again on the same port and data."""

    folder: Path
    port: int = field(default_factory=lambda: ports.choose(["s3"], {})["s3"])
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    child: Child | None = None

    @property
    def address(self) -> S3Address:
        return S3Address(f"{ports.HOST}:{self.port}", "codegraft", "tests", self.secret)

    def start(self) -> None:
        address = self.address
        self.child = s3.start(
            self.folder / "s3",
            log=self.folder / "s3.log",
            port=self.port,
            access_key=address.access_key,
            secret_key=address.secret_key,
            bucket=address.bucket,
        )

    def kill(self) -> None:
        if self.child is not None:
            os.kill(self.child.pid, signal.SIGKILL)
            self.child.wait(s3.GRACE)
            self.child = None


@dataclass
class NatsServer:
    """A real NATS server with JetStream in a folder of its own; can be restarted on the same port and data."""

    folder: Path
    port: int = field(default_factory=lambda: ports.choose(["nats"], {})["nats"])
    user: str = "tests"
    password: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    child: Child | None = None

    @property
    def url(self) -> str:
        return f"nats://{ports.HOST}:{self.port}"

    def start(self) -> None:
        self.child = nats.start(
            self.folder / "data", log=self.folder / "log", port=self.port, user=self.user, password=self.password
        )

    def stop(self) -> None:
        if self.child is not None:
            self.child.stop(timedelta(seconds=10))
            self.child = None


def _running(folder: Path) -> Iterator[NatsServer]:
    server = NatsServer(folder)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A real NATS server that the whole session shares: use names of your own."""
    yield from _running(tmp_path_factory.mktemp("nats"))


@pytest.fixture(scope="module")
def nats_of_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A real NATS server for the tests of one file, which may empty it, and stop and start it."""
    yield from _running(tmp_path_factory.mktemp("nats"))


@pytest.fixture
def own_nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A real NATS server for one test, which may stop and start it."""
    yield from _running(tmp_path)


def standing_on(nats: NatsServer, s3: S3Address, cache: Path) -> CoreSettings:
    """The settings of a service on these two servers, in the default bucket."""
    return CoreSettings(
        nats_url=nats.url,
        nats_user=nats.user,
        nats_password=SecretStr(nats.password),
        s3_endpoint=s3.endpoint,
        s3_access_key=SecretStr(s3.access_key),
        s3_secret_key=SecretStr(s3.secret_key),
        cache_dir=cache,
    )
