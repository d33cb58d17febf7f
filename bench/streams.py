"""What the transport costs: ``python -m bench.streams [--threads N] [--rounds N]``.

One engine in this process completes 100 prompts at once: driven directly, and through the gRPC server of the service,
with the callers in a process of their own (bench/callers.py). The two take turns. Tokens a second count from the first
request to the end of the last; processor time is this process's, engine and server, without the callers'.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import queue
import subprocess
import sys
import sysconfig
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from bench.figures import row
from services.cli.local import ports
from services.core import log
from services.core.models import catalogue, weights
from services.core.models.prompts import Prompt, completion_prompt
from services.core.models.spelling import Overhang
from services.core.rpc import server
from services.core.runtime import Runtime
from services.inference.assembly import Replica
from services.inference.config import InferenceSettings
from services.inference.engine.scheduler import Limits
from services.inference.engine.sequence import Output, Sequence
from services.inference.engine.text import TextStream

if TYPE_CHECKING:
    from services.inference.model import LoadedModel

STREAMS, TOKENS, PROMPT = 100, 48, 200
"""Streams, tokens of each, characters of their prompts."""
LONGEST = 100.0
"""Seconds until which a round has to be through."""
LIMITS = Limits(running=STREAMS, waiting=2 * STREAMS, project_waiting=2 * STREAMS)
"""All of them in every step: what the transport has to keep up with."""


def prompts() -> list[str]:
    """Pieces of a file of the standard library."""
    text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text()
    return [text[at : at + PROMPT] for at in range(0, STREAMS * PROMPT, PROMPT)]


class Everything:
    """Ingest in which every project exists, and a trainer without a checkpoint."""

    async def exists(self, project: str) -> bool:
        return True

    def confirmed(self, project: str) -> bool:
        return True

    def forget(self, project: str) -> None:
        return None

    async def kept_since(self, project: str) -> float | None:
        return None

    async def best(self, project: str, base_model: str) -> None:
        return None

    async def keep(self, checkpoint: str) -> None:
        return None

    async def hold(self, checkpoint: str, time: timedelta) -> None:
        return None


def direct(model: LoadedModel, prepared: list[Prompt]) -> int:
    """All streams as the engine's own sequences; how many tokens came."""
    inbox: queue.Queue[Output] = queue.Queue()
    sequences = [
        Sequence(prompt.ids, TOKENS, TextStream(model.vocabulary, overhang=overhang), inbox.put)
        for prompt in prepared
        for overhang in [Overhang.of(prompt.overhang, prompt.overhang_ids, model.vocabulary)]
    ]
    model.engine.submit(*sequences)
    tokens, running = 0, len(sequences)
    while running:
        output = inbox.get(timeout=LONGEST)
        tokens, running = tokens + output.tokens, running - (output.reason is not None)
    return tokens


def through(callers: subprocess.Popen[str]) -> int:
    """All streams through the server; how many tokens came."""
    assert callers.stdin and callers.stdout
    callers.stdin.write("go\n")
    callers.stdin.flush()
    return int(callers.stdout.readline())


async def measured(run: Callable[[], int]) -> tuple[float, float]:
    """Tokens a second, and milliseconds of processor time a token."""
    wall, processor = time.monotonic(), time.process_time()
    tokens = await asyncio.wait_for(asyncio.to_thread(run), LONGEST)
    return tokens / (time.monotonic() - wall), (time.process_time() - processor) * 1e3 / tokens


async def compare(ways: dict[str, Callable[[], int]], rounds: int) -> None:
    """Runs them in turns and prints the best round of each."""
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            once = await measured(run)
            if number:  # the first warms up
                found[way].append(once)
    best = {way: (max(speed for speed, _ in both), min(ms for _, ms in both)) for way, both in found.items()}
    for way, (speed, ms) in best.items():
        row(f"{STREAMS} streams, {way}", f"{speed:.0f} tokens/s, {ms:.2f} ms of processor time a token")
    (alone, alone_ms), (served, served_ms) = best.values()
    row(
        "the transport takes",
        f"{1 - served / alone:.1%} of the throughput, {served_ms - alone_ms:.2f} ms a token",
        "5 %",
    )


async def serve(address: str, use: Callable[[LoadedModel], Awaitable[None]], threads: int) -> None:
    """Runs the service's server with its model, without NATS and S3, until its use ends."""
    from services.inference import model as inference_model

    spec, cache, peers = catalogue.find(""), Path.home() / ".cache" / "codegraft", Everything()
    settings = InferenceSettings(listen=address, cache_dir=cache, drain_seconds=0, log_level="warning", auth="off")
    replica = Replica(
        Runtime.memory(),
        settings,
        spec,
        bests=peers,
        projects=peers,
        load=lambda: inference_model.load(spec, cache, LIMITS, threads=threads),
    )
    serving = asyncio.create_task(server.serve(settings, replica.services, background=[replica.run]))
    try:
        await use(await asyncio.wait_for(asyncio.shield(replica.model), LONGEST))
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        replica.stop()


def main(threads: int, rounds: int) -> None:
    log.configure("bench", "warning")
    weights.ensure_weights(catalogue.find(""), Path.home() / ".cache" / "codegraft")
    address = f"{ports.HOST}:{ports.choose(['inference'], {})['inference']}"
    command = [sys.executable, "-m", "bench.callers", address]
    # Before any gRPC of this process: its threads do not survive a fork.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as callers:

        async def use(model: LoadedModel) -> None:
            prepared = [
                completion_prompt(model.format, model.tokenizer, path="bench.py", prefix=prefix, suffix="", budget=1024)
                for prefix in prompts()
            ]
            ways = {"engine alone": lambda: direct(model, prepared), "through gRPC": lambda: through(callers)}
            await compare(ways, rounds)

        try:
            asyncio.run(serve(address, use, threads))
        finally:
            callers.kill()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    main(asked.threads, asked.rounds)
