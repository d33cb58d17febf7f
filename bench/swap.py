"""Swaps under load: ``python -m bench.swap [--swaps N]``.

A real inference process with NATS and S3; four streams run all the while. For each swap the trainer (this process)
stores another adapter of rank 16 on all linear layers beforehand and then says that it is the best. Half of the time
nothing is swapped, so that what the streams notice can be compared. In the end PEFT loads the same files, as a peer.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.figures import Stolen, milliseconds, percentile, row
from bench.replica import PROJECT, Replica, replica
from codegraft.event.v1.events_pb2 import AdapterSwapped, SwapPhases
from codegraft.inference.v1 import serving_pb2
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest, Checkpoint
from services.core.models import weights
from services.inference.adapters.news import SWAPPED

STREAMS = 4
TOKENS = 512
"""Of each stream; then it begins anew."""
WINDOW = 1.2
"""Seconds from an event on that count as around the swap; as many before it are what they are compared with."""
ROLLBACKS = 20
LONGEST = 30.0
"""Seconds until which a swap has to be through."""


@dataclass
class Load:
    """Streams that run all the while."""

    on: Replica
    gaps: list[tuple[float, float]] = field(default_factory=list)
    """(when a message came, seconds since the one before of its stream)"""
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self) -> None:
        source = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text()
        for number in range(STREAMS):
            self.tasks.append(asyncio.create_task(self._stream(source[number * 3000 :][:400])))

    async def _stream(self, prefix: str) -> None:
        while True:
            last = None
            async for response in self.on.complete(prefix, TOKENS):
                now = time.monotonic()
                if response.WhichOneof("part") != "delta":
                    continue
                if last is not None:
                    self.gaps.append((now, now - last))
                last = now

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


def within(values: list[tuple[float, float]], begins: list[float]) -> list[float]:
    """Values of moments within the windows that begin there."""
    return [value for at, value in values if any(begin <= at < begin + WINDOW for begin in begins)]


class Active:
    """Which version the replica serves, as its watch says."""

    def __init__(self, on: Replica) -> None:
        self._changed = asyncio.Condition()
        self.sha256 = ""
        self._task = asyncio.create_task(self._watch(on))

    async def _watch(self, on: Replica) -> None:
        async for state in on.serving.WatchServing(serving_pb2.WatchServingRequest(parent=PROJECT)):
            async with self._changed:
                self.sha256 = state.status.active_sha256
                self._changed.notify_all()

    async def until(self, sha256: str) -> None:
        async with asyncio.timeout(LONGEST), self._changed:
            await self._changed.wait_for(lambda: self.sha256 == sha256)

    def stop(self) -> None:
        self._task.cancel()


async def first_token(on: Replica) -> tuple[str, float]:
    """The version that answers a request of now, and when its first token came."""
    sha256, at = "", 0.0
    async for response in on.complete("import os\nimport sys\n\n\n", 2):
        if response.WhichOneof("part") == "started":
            sha256 = response.started.adapter_sha256
        elif not at:
            at = time.monotonic()
    return sha256, at


async def measure(on: Replica, bests: list[Checkpoint]) -> tuple[Load, dict[str, list[float]], list[float]]:
    """Times by name, seconds, and when the events went out."""
    await on.ready()
    times: dict[str, list[float]] = {"event to first token": []}
    told = asyncio.create_task(_phases(on, len(bests), times))
    load, active, begins = Load(on), Active(on), list[float]()
    await asyncio.sleep(1)  # until both follow
    await on.publish(bests[0])
    await active.until(bests[0].sha256)
    load.start()
    await asyncio.sleep(3)
    for best in bests[1:]:
        await first_token(on)  # the request that a swap has after it, too
        await asyncio.sleep(WINDOW)
        began = await on.publish(best)
        begins.append(began)
        await active.until(best.sha256)
        sha256, at = await first_token(on)
        if sha256 != best.sha256:
            raise SystemExit("another version than the swapped one has answered")
        times["event to first token"].append(at - began)
        await asyncio.sleep(max(0.0, began + WINDOW - time.monotonic()))
    await asyncio.wait_for(told, LONGEST)
    await roll_back(on, bests[-2:], times)
    active.stop()
    await load.stop()
    return load, times, begins


async def roll_back(on: Replica, versions: list[Checkpoint], times: dict[str, list[float]]) -> None:
    """Pins one of two staged versions and then the other, again and again."""
    times["rollback, until it is answered"], times["rollback, to the first token"] = [], []
    for number in range(ROLLBACKS):
        version = versions[number % 2]
        request = serving_pb2.SetServingRequest(
            parent=PROJECT, mode=serving_pb2.SERVING_MODE_PINNED, checkpoint=version.name
        )
        began = time.monotonic()
        await on.serving.SetServing(request, timeout=LONGEST)
        times["rollback, until it is answered"].append(time.monotonic() - began)
        sha256, at = await first_token(on)
        if sha256 != version.sha256:
            raise SystemExit("another version than the pinned one has answered")
        times["rollback, to the first token"].append(at - began)


async def _phases(on: Replica, count: int, times: dict[str, list[float]]) -> None:
    """Collects what the replica tells of its swaps; the first one is left out."""
    number = 0
    async for event in on.runtime.events.subscribe(SWAPPED):
        swapped, number = event.unpack(AdapterSwapped), number + 1
        if number > 1:
            times.setdefault("noticed to flipped", []).append(swapped.seconds)
            for phase in SwapPhases.DESCRIPTOR.fields_by_name:
                times.setdefault(f"  {phase}", []).append(getattr(swapped.phases, phase))
        if number == count:
            return


def pauses(notes: dict[str, Any]) -> tuple[list[float], list[float]]:
    """The longest time without a step beside each flip, and all times between two steps."""
    steps, flips = notes["steps"], notes["flips"]
    between = [(before[1], after[0] - before[1]) for before, after in itertools.pairwise(steps)]
    found = []
    for began, end in flips:
        near = [gap for at, gap in between if began - 0.1 <= at <= end + 0.1]
        if near:
            found.append(max(near))
    return found, [gap for _, gap in between if gap < 1]


async def peer(on: Replica, versions: list[Checkpoint]) -> list[float]:
    """Seconds in which PEFT loads an adapter under a new name and switches to it; nothing is generated meanwhile."""
    from peft import PeftModel

    folders = []
    for version in versions:
        manifest = await on.runtime.artifacts.manifest(version.name, AdapterManifest)
        folders.append(await on.runtime.artifacts.fetch(version.name, manifest.files))
    model = PeftModel.from_pretrained(weights.load_model(on.model), folders[0], adapter_name="0")
    times = []
    for number, folder in enumerate(folders[1:], 1):
        began = time.monotonic()
        model.load_adapter(folder, adapter_name=str(number))
        model.set_adapter(str(number))
        times.append(time.monotonic() - began)
    return times


def report(load: Load, times: dict[str, list[float]], begins: list[float], notes: dict[str, Any]) -> None:
    """Prints what was measured beside what is asked."""
    asked = {"event to first token": "250 and 500 ms", "rollback, until it is answered": "50 ms"}
    for name, values in times.items():
        row(name, milliseconds(values), asked.get(name, ""))
    found, usual = pauses(notes)
    said = f"{milliseconds(found)}, between any two steps p50 {percentile(usual, 0.5) * 1e3:.1f} ms"
    row("longest time without a step at a flip", said, "5 ms")
    earlier = [begin - WINDOW for begin in begins]
    costs = [(step[0], step[2]) for step in notes["steps"]]
    around, before = within(costs, begins), within(costs, earlier)
    for share in (0.5, 0.99, 1.0):
        ours, theirs = percentile(around, share) * 1e3, percentile(before, share) * 1e3
        row(f"processor time of a step, p{share * 100:.0f}", f"{ours:.1f} ms around a swap, {theirs:.1f} ms before")
    around, before = within(load.gaps, begins), within(load.gaps, earlier)
    for share, most in ((0.5, ""), (0.95, ""), (0.99, "1.2 x")):
        ours, theirs = percentile(around, share), percentile(before, share)
        said = f"{ours * 1e3:.1f} ms around a swap, {theirs * 1e3:.1f} ms before: {ours / theirs:.2f} x"
        row(f"inter-token p{share * 100:.0f}", said, most)


async def main(swaps: int) -> None:
    with tempfile.TemporaryDirectory(prefix="codegraft-notes-") as folder:
        notes = Path(folder) / "notes.json"
        async with replica("bench.observed", BENCH_NOTES=str(notes)) as on:
            bests = [await on.store(step) for step in range(1, swaps + 2)]
            stolen = Stolen()
            load, times, begins = await measure(on, bests)
            taken = stolen.share()
            await on.stop()
            loading = await peer(on, bests[:4])
        report(load, times, begins, json.loads(notes.read_text()))
        row("taken by the host meanwhile", taken)
        row("peer: PEFT's load_adapter", f"{statistics.median(loading) * 1e3:.0f} ms without a token")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=20)
    asyncio.run(main(parser.parse_args().swaps))
