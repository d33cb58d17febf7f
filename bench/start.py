"""Start of the service: ``python -m bench.start [--rounds N]``.

From the start of the process to health's SERVING and to the first completion, with the model in the cache.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from datetime import timedelta

from bench.figures import row
from bench.replica import Replica, replica
from services.core.rpc import probe

PEER = "vLLM's CPU build takes 80 to 100 s"


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
    print(f"peer: {PEER} (not in this run)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    asyncio.run(main(parser.parse_args().rounds))
