"""A whole stack of real processes that a test may kill, pause and start again; they meet over proxies.

It is made of the same parts as that of `codegraft up`, whose supervisor leaves what has crashed for a person to see.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path

from pydantic import SecretStr

from services.cli.local import gateway, ports
from services.cli.local.files import DataFolder
from services.cli.local.process import tail
from services.cli.local.stack import BEHIND, BUCKET, SERVICES, check, seeds, service_environment
from services.client.access import Access
from services.client.addresses import Addresses
from services.client.aio.client import AsyncCodegraft
from services.core.config import CoreSettings
from services.core.rpc import probe
from tests.chaos import starter
from tests.chaos.disk import SmallDisk
from tests.chaos.proxy import Network, Proxy

SERVERS = ("nats", "s3")
PARTS = (*SERVERS, *SERVICES)
REPLICAS = {"second-scanner": "scanner", "second-trainer": "trainer"}
"""More workers, whom nobody calls."""
WAYS = [*((service, server) for service in BEHIND for server in SERVERS), *(("", service) for service in SERVICES)]
"""Who goes to whom over a proxy; "" is everybody."""
LEASE = 4.0
"""Seconds after which a silent worker's job is another's, instead of 30."""
NATS_ROOM = 128 << 20
"""Bytes that JetStream may take."""
STARTUP = 90.0


def _way(way: tuple[str, str]) -> str:
    """The name of a proxy."""
    return "-".join(["way", *way])


class WholeStack:
    """NATS, S3, the four services and the gateway.

    Attributes:
        s3, data: the disks.
        pids: process ids by name.
        ways: the proxies: ("scanner", "nats") is the scanner's way to NATS, ("", "scanner") everybody's to the scanner.
    """

    def __init__(
        self, folder: Path, network: Network, base: Path, *, s3: SmallDisk, data: SmallDisk, settings: Mapping[str, str]
    ) -> None:
        """Starts nothing yet.

        Args:
            base: folder of the base model.
            s3: what the S3 server has its files on.
            data: what the services keep on disk, and write while they work.
            settings: variables of all services.
        """
        self.folder = DataFolder(folder)
        self.folder.create()
        self._network = network
        self._base = base
        self.s3 = s3
        self.data = data
        self._settings = settings
        self.credentials = self.folder.credentials()
        # All at once: what listens later only has its port chosen a second time otherwise, now and then.
        self._ports = ports.choose([*PARTS, *REPLICAS, *map(_way, WAYS)], {})
        self.ways: dict[tuple[str, str], Proxy] = {}
        self.pids: dict[str, int] = {}
        spawned = multiprocessing.get_context("spawn")
        left = sorted({*ports.RANGE} - {*self._ports.values()})
        self._starter = ProcessPoolExecutor(1, mp_context=spawned, initializer=starter.initialize, initargs=(left,))

    def start(self) -> None:
        """Everything, until it serves."""
        for way in WAYS:
            self.ways[way] = self._network.proxy(_way(way), self._ports[_way(way)], self._ports[way[1]])
        for name in PARTS:
            self.begin(name)
        for name in SERVICES:
            self.await_health(name)

    def stop(self) -> None:
        """Ends everything at once."""
        self._starter.submit(starter.kill_all).result(STARTUP)
        self._starter.shutdown()

    def kill(self, name: str) -> None:
        """SIGKILL."""
        self._starter.submit(starter.kill, name).result(STARTUP)

    def pause(self, name: str) -> None:
        """SIGSTOP."""
        os.kill(self.pids[name], signal.SIGSTOP)

    def wake(self, name: str) -> None:
        """SIGCONT."""
        os.kill(self.pids[name], signal.SIGCONT)

    def begin(self, name: str) -> None:
        """Starts one part. A server is ready at the return, a service only when :meth:`await_health` returns."""
        log, keys = self.folder.log(name), self.credentials
        match name:
            case "nats":
                begun = self._starter.submit(
                    starter.begin_nats,
                    data=self.folder.root / name,
                    log=log,
                    port=self._ports[name],
                    user=keys.nats_user,
                    password=keys.nats_password,
                    services={each: own.nats_password for each, own in keys.services.items()},
                    max_store=NATS_ROOM,
                )
            case "s3":
                begun = self._starter.submit(
                    starter.begin_s3,
                    data=self.s3.folder / "s3",
                    log=log,
                    port=self._ports[name],
                    access_key=keys.s3_access_key,
                    secret_key=keys.s3_secret_key,
                    bucket=BUCKET,
                    services={each: (own.s3_access_key, own.s3_secret_key) for each, own in keys.services.items()},
                )
            case _:
                service = REPLICAS.get(name, name)
                environment = {**self._environment(service), "CODEGRAFT_LISTEN": self.address(name)}
                begun = self._starter.submit(starter.begin_service, name, service, log, environment, self.folder.root)
        self.pids[name] = begun.result(STARTUP)

    def await_health(self, name: str) -> None:
        """Returns once a service serves."""
        deadline = time.monotonic() + STARTUP
        while (state := check(name, self.address(name), timedelta(seconds=1))) != probe.SERVING:
            ended = self._starter.submit(starter.state, name).result(STARTUP)
            assert ended == "is running", f"{name} {ended}\n{tail(self.folder.log(name))}"
            assert time.monotonic() < deadline, f"{name} is {state}\n{tail(self.folder.log(name))}"
            time.sleep(0.05)

    def address(self, name: str) -> str:
        """Where a part itself listens, without a proxy."""
        return f"{ports.HOST}:{self._ports[name]}"

    def log(self, name: str) -> str:
        """What a part has written, since the start of the stack."""
        return self.folder.log(name).read_text(errors="replace")

    def client(self) -> AsyncCodegraft:
        """The operator's, over the proxies."""
        addresses = Addresses(**{name: self.ways["", name].address for name in BEHIND})
        return AsyncCodegraft(addresses, access=Access(self.credentials.api_key))

    def admin(self, cache: Path) -> CoreSettings:
        """How a test looks into NATS and S3 itself."""
        return CoreSettings(
            nats_url=f"nats://{self.address('nats')}",
            nats_user=self.credentials.nats_user,
            nats_password=SecretStr(self.credentials.nats_password),
            s3_endpoint=self.address("s3"),
            s3_access_key=SecretStr(self.credentials.s3_access_key),
            s3_secret_key=SecretStr(self.credentials.s3_secret_key),
            s3_bucket=BUCKET,
            cache_dir=cache,
        )

    def _environment(self, service: str) -> dict[str, str]:
        to = {name: self.ways["", name].address for name in SERVICES}
        if service == gateway.NAME:
            return {**os.environ, **gateway.environment(self._settings, to, self.credentials.console_key)}
        servers = {name: self.ways[service, name].address for name in SERVERS}
        model = {f"CODEGRAFT_{name.upper()}_MODEL": f"dir:{self._base}" for name in ("scanner", "trainer", "inference")}
        threads = {f"CODEGRAFT_{name.upper()}_THREADS": "1" for name in ("scanner", "trainer", "inference")}
        temporary = self.data.folder / service / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        base = {**os.environ, **model, **threads, **self._settings}
        own = {
            "CODEGRAFT_CACHE_DIR": str(self.data.folder / service),
            "CODEGRAFT_JOB_LEASE_SECONDS": str(LEASE),
            "CODEGRAFT_INGEST_LEASE_SECONDS": str(LEASE),
            "TMPDIR": str(temporary),
        }
        if service == "ingest":
            own["CODEGRAFT_INGEST_CREDENTIAL_KEYS"] = json.dumps([self.credentials.ingest_key])
            own["CODEGRAFT_INGEST_SEED_KEYS"] = json.dumps(seeds(self.credentials))
        return {**service_environment(base, {**servers, **to}, self.credentials, service), **own}
