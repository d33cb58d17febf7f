"""Overload: ``python -m bench.overload [--seconds N]``.

First as many clients as keep a real inference process busy, each with its next request when the last one has ended:
the peak. Then four times as many requests as that were, at random moments, for a minute once the first have ended. Then
the peak again: where the machine is another one's guest its speed changes from minute to minute, and both sides of the
overload say what it gave. Tokens count when they come, of completions that end as a whole: sixteen that began together
end together, and to count them at their ends would have one more or less of these bursts in the time.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from bench.figures import Stolen, milliseconds, row
from bench.replica import Replica, replica
from codegraft.inference.v1 import completion_pb2 as pb

CLIENTS = 24
"""Of the closed loop: the engine's 16 places are never empty."""
WARM, PEAK_SECONDS = 3.0, 30.0
TIMES = 4
PROJECTS = 4
PROMPT, TOKENS = 200, 32
"""Characters of a prompt, tokens of a completion."""
PATIENCE = 3.0
"""Callers give up after so many times what a completion takes at the peak."""
LONGEST = 60.0
"""Seconds until a caller gives up at the peak."""
WHOLE = {pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_END_OF_TEXT, pb.FINISH_REASON_STOP}


@dataclass
class Seen:
    """What became of the requests."""

    whole: list[list[tuple[float, int]]] = field(default_factory=list)
    """Of each completion that ended as a whole: (when a message came, its tokens)."""
    refused: list[float] = field(default_factory=list)
    """Seconds until a refusal."""
    others: Counter[str] = field(default_factory=Counter)

    def goodput(self, begin: float, end: float) -> float:
        """Tokens a second between two moments, of completions that ended as a whole."""
        return sum(count for came in self.whole for at, count in came if begin <= at < end) / (end - begin)

    def length(self) -> float:
        """Tokens of a completion, on average."""
        return sum(count for came in self.whole for _, count in came) / len(self.whole)


class Prompts:
    """Pieces of the standard library, so that each prompt is another one."""

    def __init__(self) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        self._text = "".join(file.read_text() for file in files[:60])
        self._random = random.Random(0)

    def next(self) -> str:
        at = self._random.randrange(len(self._text) - PROMPT)
        return self._text[at : at + PROMPT]


async def request(on: Replica, prefix: str, number: int, seen: Seen, patience: float) -> None:
    """One completion of one of the projects."""
    began, came, reason = time.monotonic(), list[tuple[float, int]](), pb.FINISH_REASON_UNSPECIFIED
    try:
        async for part in on.complete(prefix, TOKENS, timeout=patience, parent=f"projects/bench-{number % PROJECTS}"):
            came.append((time.monotonic(), part.delta.tokens))
            reason = part.finished.reason
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            seen.refused.append(time.monotonic() - began)
        else:
            seen.others[error.code().name] += 1
        return
    if reason in WHOLE:
        seen.whole.append(came)
    else:
        seen.others[pb.FinishReason.Name(reason)] += 1


async def closed(on: Replica, prompts: Prompts) -> tuple[float, float]:
    """Tokens and completions a second at the peak."""
    seen, until = Seen(), time.monotonic() + WARM + PEAK_SECONDS

    async def client(number: int) -> None:
        while time.monotonic() < until:
            await request(on, prompts.next(), number, seen, LONGEST)

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    if seen.others or seen.refused:
        raise SystemExit(f"completions failed while nothing was overloaded: {seen.others}, {len(seen.refused)} refused")
    if not seen.whole:
        raise SystemExit("no completion came to its end: the machine is too busy to measure anything")
    peak = seen.goodput(until - PEAK_SECONDS, until)
    return peak, peak / seen.length()


async def offered(
    on: Replica, prompts: Prompts, rate: float, patience: float, seconds: float, warm: float
) -> tuple[Seen, float, list[float]]:
    """Offers so many completions a second; what became of them, the goodput, and the process's memory meanwhile.

    Args:
        warm: seconds until the first ones have had time to end: from then on the goodput counts.
    """
    seen, tasks, memory, times = Seen(), set[asyncio.Task[None]](), [on.resident()], random.Random(1)
    began = following = time.monotonic()
    number = 0
    while following < began + warm + seconds:
        await asyncio.sleep(max(0.0, following - time.monotonic()))
        task = asyncio.create_task(request(on, prompts.next(), number, seen, patience))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        number, following = number + 1, following + times.expovariate(rate)
        if time.monotonic() > began + 5 * len(memory):
            memory.append(on.resident())
    await asyncio.wait(tasks, timeout=patience + 5)
    for task in tasks:
        task.cancel()
    memory.append(on.resident())
    return seen, seen.goodput(began + warm, began + warm + seconds), memory


async def main(seconds: float) -> None:
    # So few blocks have all been used after the peak; the memory of others, taken at their first use, is no growth.
    async with replica(CODEGRAFT_INFERENCE_KV_TOKENS="8192") as on:
        await on.ready()
        prompts, stolen = Prompts(), Stolen()
        before, completions = await closed(on, prompts)
        taken, took = [stolen.share()], CLIENTS / completions
        seen, goodput, memory = await offered(on, prompts, TIMES * completions, PATIENCE * took, seconds, warm=took)
        taken.append(stolen.share())
        after, _ = await closed(on, prompts)
        taken.append(stolen.share())
        peak = (before + after) / 2
        said = f"{before:.0f} tokens/s before, {after:.0f} after; a completion took {took:.1f} s"
        row(f"peak, {CLIENTS} clients", said)
        said = f"{goodput:.0f} tokens/s, {goodput / peak:.0%} of the peak (of both)"
        row(f"{TIMES} x offered for {seconds:.0f} s", said, "90 %")
        row("taken by the host: before, in it, after", ", ".join(taken))
        row("refused", f"{len(seen.refused)} of {_count(seen)}")
        row("a refusal took", milliseconds(seen.refused) if seen.refused else "none was refused", "p95 50 ms")
        if seen.others:
            row("ended otherwise", ", ".join(f"{name} {count}" for name, count in seen.others.most_common()))
        half = memory[len(memory) // 2]
        said = f"{memory[0]:.0f} MB before, {half:.0f} half way, {memory[-1]:.0f} after, {max(memory):.0f} at most"
        row("memory", said, "flat")


def _count(seen: Seen) -> int:
    return len(seen.whole) + len(seen.refused) + seen.others.total()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    asyncio.run(main(parser.parse_args().seconds))
