"""Day two with real processes: replicas are replaced under running streams, and NATS loses everything."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from codegraft.inference.v1 import completion_pb2 as pb
from codegraft.inference.v1 import completion_pb2_grpc
from codegraft.trainer.v1 import run_pb2, run_pb2_grpc
from services.cli.control import copied, rebuild
from services.cli.control.installation import Installation
from services.cli.control.installation import opened as connected
from services.cli.local import ports
from services.core import errors
from services.core.config import CoreSettings
from services.core.rpc import probe
from services.core.rpc.client import OPTIONS
from services.core.rpc.status import from_rpc
from services.core.store.s3 import S3Address
from services.inference.assembly import COMPLETION_SERVICE
from tests.chaos.house import Nursery, opened
from tests.conftest import NatsServer, standing_on

pytestmark = pytest.mark.usefixtures("own_logs")

TOKENS = 64


class Replicas(Nursery):
    """Replicas beside each other, each on an address of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.environment: dict[str, str] = {}
        self.pids: dict[str, int] = {}
        """By address."""

    def start(self, environment: dict[str, str]) -> None:
        self.environment = environment
        super().start({**environment, "CODEGRAFT_TEST_BESIDE": "1"})
        self.pids[environment["CODEGRAFT_LISTEN"]] = self._child

    def start_on(self, address: str) -> None:
        self.start({**self.environment, "CODEGRAFT_LISTEN": address})

    async def drain(self, address: str) -> float:
        """SIGTERM, and the end of the process; the seconds that it took."""
        began, process = time.monotonic(), psutil.Process(self.pids.pop(address))
        os.kill(process.pid, signal.SIGTERM)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() - began < 30
            await asyncio.sleep(0.02)
        return time.monotonic() - began

    def kill(self) -> None:
        for pid in self.pids.values():
            os.kill(pid, signal.SIGKILL)
        self.pids.clear()


@pytest.fixture(scope="module")
def replicas() -> Iterator[Replicas]:
    made = Replicas()  # before any channel: it is forked
    yield made
    made.close()


@dataclass
class Editors:
    """Streams, one after the other, balanced over the replicas. A call that nobody began to answer is made again."""

    stub: Any
    project: str
    spans: list[tuple[float, float]] = field(default_factory=list)
    """(begin, end) of the streams that came to their end."""
    again: int = 0

    async def work(self) -> None:
        while True:
            request = pb.CompleteRequest(
                parent=self.project,
                prompt=pb.CodePrompt(path="a.py", prefix="def main():\n"),
                stop=pb.StopRule(max_tokens=TOKENS),
            )
            began, started, finished = time.monotonic(), False, False
            try:
                async for response in self.stub.Complete(request, timeout=30, wait_for_ready=True):
                    started = True
                    finished = response.WhichOneof("part") == "finished"
            except grpc.aio.AioRpcError as failure:
                error = from_rpc(failure)
                assert not started, f"a stream broke: {error}"
                assert isinstance(error, errors.Unavailable), error
                self.again += 1
                await asyncio.sleep(0.05)
                continue
            assert finished, "a stream ended without its last word"
            self.spans.append((began, time.monotonic()))

    def over(self, moment: float) -> int:
        """Streams that ran at that moment, to their end."""
        return sum(begin < moment < end for begin, end in self.spans)


async def until_serving(address: str) -> None:
    deadline = time.monotonic() + 40
    while await asyncio.to_thread(_health, address) != probe.SERVING:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def _health(address: str) -> str:
    return probe.check(address, timedelta(seconds=2), service=COMPLETION_SERVICE)


@pytest.fixture
def settings(own_nats_server: NatsServer, s3_server: S3Address, tmp_path: Path) -> CoreSettings:
    return standing_on(own_nats_server, s3_server, tmp_path / "cache")


async def test_replicas_are_replaced_under_running_streams(
    replicas: Replicas, settings: CoreSettings, tmp_path: Path
) -> None:
    async with opened(replicas, settings, tmp_path) as house:
        one, two = next(iter(replicas.pids)), f"{ports.HOST}:{ports.choose(['it'], {})['it']}"
        replicas.start_on(two)
        for address in (one, two):
            await until_serving(address)
        async with grpc.aio.insecure_channel(f"ipv4:{one},{two}", options=OPTIONS) as channel:
            editors = Editors(completion_pb2_grpc.CompletionServiceStub(channel), house.one)
            tasks = [asyncio.create_task(editors.work()) for _ in range(3)]
            moments = []
            for address in (one, two):
                await asyncio.sleep(0.3)
                moments.append(time.monotonic())
                took = await replicas.drain(address)
                assert took < 10, f"a drain took {took:.1f} s"
                replicas.start_on(address)
                await until_serving(address)
            await asyncio.sleep(0.2)
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        failures = [error for error in ended if not isinstance(error, asyncio.CancelledError)]
        assert not failures, failures
        print(f"{len(editors.spans)} streams, {editors.again} calls made again")
        assert all(editors.over(moment) >= 2 for moment in moments), "no stream ran while a replica left"
        assert max(begin for begin, _ in editors.spans) > moments[-1], "the others went on"


async def test_after_nats_lost_everything_what_served_serves_again(
    replicas: Replicas, settings: CoreSettings, tmp_path: Path
) -> None:
    place = Installation(settings)
    async with opened(replicas, settings, tmp_path) as house, connected(place) as control:
        [address] = replicas.pids
        _, first = await house.commit(house.one, 1)
        checkpoint, best = await house.commit(house.one, 2)
        await house.commit(house.one, 3, best=False)
        await house.until_answered_by(house.one, best)
        chosen, pinned = await house.commit(house.two, 1)
        await house.commit(house.two, 2)
        await house.set(house.two, "PINNED", chosen)
        await house.until_answered_by(house.two, pinned)
        while not any(one.pinned_checkpoint == chosen for one in (await copied.read(control)).policies):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await replicas.drain(address)
        for info in await control.nats.js.streams_info():
            await control.nats.js.delete_stream(info.config.name or "")

        made, _, outcome = await rebuild._rebuild(place, dry_run=False)
        assert house.one in {project.name for project in made.projects} and not outcome.unfit
        async with grpc.aio.insecure_channel(replicas.environment["CODEGRAFT_TRAINER_ADDRESS"]) as channel:
            stub = run_pb2_grpc.RunServiceStub(channel)
            [run] = (await stub.ListRuns(run_pb2.ListRunsRequest(parent=house.one))).runs
            listed = (await stub.ListCheckpoints(run_pb2.ListCheckpointsRequest(parent=run.name))).checkpoints
        assert run.best_checkpoint == checkpoint and [one.best for one in listed] == [False, True, False]
        replicas.start_on(address)
        await house.until_answered_by(house.one, best)
        assert best != first
        assert await house.answered_by(house.two) == pinned, "not even once by its best one"
