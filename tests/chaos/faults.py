"""Faults at random: which, when and how long comes from a seed; and how long it took until all was well again."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import httpx2

from services.cli.local.stack import SERVICES
from services.client.aio.client import AsyncCodegraft
from services.core.errors import CodegraftError
from tests.chaos.ledger import Ledger
from tests.chaos.stack import LEASE, PARTS, WholeStack

WORKERS = ("scanner", "trainer")
BUSY = 15.0
"""Seconds to wait for a worker to have something to do."""
RECOVERY = 60.0
"""Seconds after which something counts as broken for good."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault and what became of it. Times are of the monotonic clock."""

    kind: str
    """For people: "scanner killed"."""
    service: str
    """Whose work was disturbed."""
    began: float
    over: float
    """When the part was started again, or the network was well."""
    well: float
    """When a call that needs the part was answered for the first time."""


@dataclass
class Troublemaker:
    """Brings faults over a stack."""

    stack: WholeStack
    client: AsyncCodegraft
    ledger: Ledger
    rng: random.Random
    project: str
    """That the calls are about which tell whether all is well."""
    faults: list[Fault] = field(default_factory=list)

    async def kill_each(self) -> None:
        """Every part once, in any order, two at a time."""
        names = self.rng.sample(PARTS, len(PARTS))

        async def kill(some: Sequence[str]) -> None:
            for name in some:
                await self._strike(f"{name} killed")

        await asyncio.gather(kill(names[::2]), kill(names[1::2]))

    async def work(self, seconds: float) -> None:
        """One fault after the other: every kind once, in any order, then at random until the time is over."""
        deadline = time.monotonic() + seconds
        kinds = sorted(self._kinds())
        first = self.rng.sample(kinds, len(kinds))
        while first or time.monotonic() < deadline:
            await self._strike(first.pop() if first else self.rng.choice(kinds))

    async def _strike(self, kind: str) -> None:
        await asyncio.sleep(self.rng.uniform(0.0, 2.0))
        await self._kinds()[kind](kind)

    def _kinds(self) -> Mapping[str, Callable[[str], Awaitable[None]]]:
        killed = {f"{name} killed": self._kill for name in PARTS}
        paused = {f"{name} paused": self._pause for name in WORKERS}
        return killed | paused | {"network cut": self._disturb, "network stalled": self._disturb}

    async def _kill(self, kind: str) -> None:
        name = kind.split()[0]
        await self._until_busy(name)
        began = time.monotonic()
        await asyncio.to_thread(self.stack.kill, name)
        await asyncio.sleep(self.rng.uniform(0.0, 1.5))
        over = time.monotonic()
        await asyncio.to_thread(self.stack.begin, name)
        await self._until_well(kind, name, began, over)

    async def _pause(self, kind: str) -> None:
        name = kind.split()[0]
        await self._until_busy(name)
        began = time.monotonic()
        self.stack.pause(name)
        await asyncio.sleep(self.rng.uniform(0.5, 1.5) * LEASE)
        self.stack.wake(name)
        await self._until_well(kind, name, began, time.monotonic())

    async def _disturb(self, kind: str) -> None:
        (client, server), way = self.rng.choice(sorted(self.stack.ways.items(), key=lambda item: item[0]))
        began = time.monotonic()
        await asyncio.to_thread(way.cut if kind == "network cut" else way.stall)
        await asyncio.sleep(self.rng.uniform(0.5, 5.0))
        await asyncio.to_thread(way.mend)
        await self._until_well(kind, client or server, began, time.monotonic())

    async def _until_busy(self, name: str) -> None:
        """A worker is disturbed at work, if there is some to wait for."""
        if name in WORKERS:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BUSY):
                    while not any(job.worker == name and job.runs for job in self.ledger.jobs):  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
                    await asyncio.sleep(self.rng.uniform(0.0, 1.0))

    async def _until_well(self, kind: str, name: str, began: float, over: float) -> None:
        while True:
            try:
                await asyncio.wait_for(self._try(name), 5)
                break
            except (CodegraftError, TimeoutError, httpx2.HTTPError) as error:
                assert time.monotonic() - over < RECOVERY, f"{name} is not well again: {error}"
            await asyncio.sleep(0.05)
        self.faults.append(Fault(kind, name, began, over, time.monotonic()))

    async def _try(self, name: str) -> None:
        """A call that only a sound part can answer."""
        match name:
            case "nats" | "ingest":
                await self.client.projects.get(self.project)
            case "s3":
                await self.client.sources.upload(self.project, secrets.token_bytes(32))
            case "scanner":
                _ = [each async for each in self.client.scans.list(self.project)]
            case "trainer":
                _ = [each async for each in self.client.runs.list(self.project)]
            case "inference":
                async for _piece in self.client.completions.complete(self.project, prefix="a", max_tokens=2, timeout=5):
                    pass
            case _:
                assert name in SERVICES
                key = {"authorization": f"Bearer {self.stack.credentials.api_key}"}
                async with httpx2.AsyncClient(base_url=f"http://{self.stack.ways['', name].address}") as http:
                    (await http.get("/v1/models", headers=key)).raise_for_status()
