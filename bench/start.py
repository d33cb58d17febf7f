"""Start of the service: ``python -m bench.start [--rounds N]``.

From the start of the process to health's SERVING and to the first completion, with the model in the cache. The peer is
vLLM's CPU build, to its first token and without a server around it (bench/vllm_cpu.py).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from datetime import timedelta

from bench import vllm_cpu
from bench.figures import row
from bench.replica import Replica, model_folder, replica
from services.core.rpc import probe


async def serving(on: Replica) -> float:
    """Seconds from the start of the process until its health is SERVING."""
    while await asyncio.to_thread(probe.check, on.address, timedelta(seconds=1)) != probe.SERVING:
        await asyncio.sleep(0.02)
        if time.monotonic() - on.spawned > 60:
            raise SystemExit("the service is not healthy after a minute")
    return time.monotonic() - on.spawned


async def main(rounds: int) -> None:
    health_times, answer_times = [], []
    for _ in range(rounds):
        async with replica() as on:
            healthy, answered = await asyncio.gather(serving(on), on.ready())
            health_times.append(healthy)
            answer_times.append(answered)
    for what, times in (("process to SERVING", health_times), ("process to the first completion", answer_times)):
        row(what, " ".join(f"{seconds:.1f}" for seconds in times) + " s", "10 s")
    with vllm_cpu.server(model_folder(), os.cpu_count() or 1, 1, 1024) as peer:
        if peer is not None:
            ratio = peer.started / min(answer_times)
            row("vLLM's CPU build to its first token", f"{peer.started:.1f} s, {ratio:.1f} x the best of these")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    asyncio.run(main(parser.parse_args().rounds))
