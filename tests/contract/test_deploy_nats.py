"""The JetStream cluster of the Helm chart: its own configuration, run as three real servers on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from services.cli.local import ports
from services.core.errors import RevisionMismatch, StateUnavailable
from services.core.jobs.nats import STREAM, NatsQueue
from services.core.nats_connection import NatsConnection, connect
from services.core.state.nats import NatsState
from tests.unit.deploy.chart import container, of_kind, rendered, workloads

USER = "trainer"
SERVERS = 3
PROGRAM = str(Path(sysconfig.get_path("scripts"), "nats-server"))


@dataclass
class Server:
    """One of the three: its ports and its process."""

    name: str
    client: int
    monitor: int
    process: subprocess.Popen[bytes]
    pid_file: Path

    def jsz(self) -> dict[str, Any]:
        """What KEDA asks for."""
        url = f"http://127.0.0.1:{self.monitor}/jsz?acc=%24G&consumers=true&config=true"
        with urllib.request.urlopen(url, timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def is_ready(self) -> bool:
        """As the chart's readiness probe sees it."""
        url = f"http://127.0.0.1:{self.monitor}/healthz?js-server-only=true"
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def password(user: str) -> str:
    """Of a user; the trainer's would be read as a number, were it not quoted."""
    return "20261126" if user == USER else f"password-of-{user}"


def environment(pod: str) -> dict[str, str]:
    """The container's variables, put together as Kubernetes does: references to earlier ones in $(…)."""
    given = {"POD_NAME": pod}
    for one in container(workloads(rendered("ha"))["nats"])["env"]:
        if "value" in one:
            given[one["name"]] = re.sub(r"\$\((\w+)\)", lambda match: given[match[1]], one["value"])
        elif one["name"] != "POD_NAME":
            given[one["name"]] = password(one["name"].removeprefix("GIVEN_").lower())
    return given


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Three servers with the chart's configuration, in which only ports, folders and the hosts of routes are others."""
    maps = of_kind(rendered("ha"), "ConfigMap")
    config: str = next(one["data"]["nats.conf"] for one in maps if "nats.conf" in one["data"])
    meant = {"client": 4222, "monitor": 8222, "cluster": 6222}
    chosen = ports.choose([f"{what}-{number}" for what in meant for number in range(SERVERS)], {})
    for number in range(SERVERS):
        route = f"nats://127.0.0.1:{chosen[f'cluster-{number}']}"
        config = re.sub(rf"nats://\S+-nats-{number}\.\S+:6222", route, config)
    servers = []
    for number in range(SERVERS):
        folder = tmp_path_factory.mktemp(f"nats-{number}")
        mine = config.replace("/run/nats", str(folder)).replace("store_dir: /data", f"store_dir: {folder}")
        for what, port in meant.items():
            mine = mine.replace(f"0.0.0.0:{port}", f"127.0.0.1:{chosen[f'{what}-{number}']}")
        (folder / "nats.conf").write_text(mine)
        name = f"demo-codegraft-nats-{number}"
        process = subprocess.Popen(
            [PROGRAM, "--config", str(folder / "nats.conf")],
            env=environment(name),
            stdout=subprocess.DEVNULL,
            stderr=(folder / "log").open("wb"),
        )
        servers.append(
            Server(name, chosen[f"client-{number}"], chosen[f"monitor-{number}"], process, folder / "nats.pid")
        )
    deadline = time.monotonic() + 60
    while not all(server.is_ready() for server in servers):
        assert time.monotonic() < deadline and all(server.process.poll() is None for server in servers)
        time.sleep(0.05)
    yield servers
    for server in servers:
        server.process.kill()
        server.process.wait()


async def connected(servers: list[Server], user: str, password: str) -> NatsConnection:
    url = ",".join(f"nats://127.0.0.1:{server.client}" for server in servers)
    return await connect(url, user=user, password=password, replicas=SERVERS)


async def eventually(attempt: Any) -> Any:
    """Its result, once it no longer fails: a cluster takes a moment for its elections."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return await attempt()
        except StateUnavailable:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)


def lag(leader: Server) -> int:
    """Jobs that wait or are with a worker, as KEDA reads them."""
    (account,) = [one for one in leader.jsz()["account_details"] if one["name"] == "$G"]
    (stream,) = [one for one in account["stream_detail"] if one["name"] == STREAM]
    (found,) = [one["num_pending"] + one["num_ack_pending"] for one in stream["consumer_detail"]]
    return int(found)


async def test_three_copies_of_everything_and_one_server_may_go(cluster: list[Server]) -> None:
    """Written to three, read after one has gone as it does in an upgrade; and what KEDA reads is there."""
    with pytest.raises(StateUnavailable):
        await connected(cluster, USER, password("scanner"))
    connection = await connected(cluster, USER, password(USER))
    operator = await connected(cluster, "operator", password("operator"))
    state, queue = NatsState(connection, USER), NatsQueue(connection)
    revision = await eventually(lambda: state.create("projects/p", b"one"))
    await eventually(lambda: queue.submit("run", "projects/p/runs/one"))
    for stream in (f"KV_{USER}", STREAM):
        info = await operator.js.stream_info(stream)
        assert info.config.num_replicas == SERVERS and info.cluster is not None
        copies = {info.cluster.leader, *(peer.name for peer in info.cluster.replicas or [])}
        assert copies == {server.name for server in cluster}
    consumer = await connection.js.consumer_info(STREAM, "workers-run")
    leader = next(one for one in cluster if consumer.cluster and one.name == consumer.cluster.leader)
    async with asyncio.timeout(60):  # two of the three have the job for certain, and the leader may be the third
        while await asyncio.to_thread(lag, leader) != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    going = next(one for one in cluster if one is not leader)
    signal = [PROGRAM, "--signal", f"ldm={going.pid_file}"]
    await asyncio.to_thread(subprocess.run, signal, check=True, env={"PATH": os.defpath})
    going.process.terminate()  # what the kubelet does after preStop
    with contextlib.suppress(RevisionMismatch):  # by an attempt whose answer was lost with the server
        await eventually(lambda: state.update("projects/p", b"two", revision))
    entry = await eventually(lambda: state.get("projects/p"))
    assert entry is not None and entry.value == b"two" and entry.revision > revision
    delivery = None
    async with asyncio.timeout(60):
        while delivery is None:
            delivery = await eventually(lambda: queue.take("run", 5))
    assert delivery.name == "projects/p/runs/one"
    await delivery.ack()
    await connection.close()
    await operator.close()


async def test_a_service_keeps_to_its_own_bucket(cluster: list[Server]) -> None:
    scanner = await connected(cluster, "scanner", password("scanner"))
    operator = await connected(cluster, "operator", password("operator"))
    await eventually(lambda: NatsState(scanner, "scanner").create("projects/p", b"one"))
    await eventually(lambda: NatsState(operator, USER).get("projects/q"))  # the bucket is there
    with pytest.raises((StateUnavailable, TimeoutError)):
        await asyncio.wait_for(NatsState(scanner, USER).create("projects/q", b"of the trainer"), 1)
    assert await eventually(lambda: NatsState(operator, USER).get("projects/q")) is None
    await scanner.close()
    await operator.close()
