"""Typing: ``python -m bench.keystrokes [--lines N] [--pace SECONDS]``.

Lines of a file of the standard library are typed key by key, deep enough in it that the prompt has about 1,000 tokens.
With each key goes a request for the rest of the line, through a real inference process: first in an editor session, in
which a newer request takes the older one's place, then without.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from bench.figures import milliseconds, percentile, row
from bench.replica import Replica, replica
from codegraft.inference.v1 import completion_pb2 as pb

FILE = "argparse.py"
BEFORE = 6000
"""Characters before the first line that is typed; more than a prompt has room for."""
TOKENS = 24
"""Most of a line's rest."""
LONGEST = 20.0
"""Seconds until a request ends, however far it is."""


@dataclass
class Key:
    """One key stroke's request."""

    cold: bool
    """Whether it is the line's first: nobody has asked around there before."""
    sent: float
    started: float = 0.0
    first: float = 0.0
    """When its first token came; 0 for one that was superseded before."""
    prompt: int = 0
    cached: int = 0
    reason: int = 0
    error: str = ""


def places(count: int) -> tuple[str, list[tuple[int, int]]]:
    """The file's text, and where lines to type begin and end."""
    text = (Path(sysconfig.get_paths()["stdlib"]) / FILE).read_text()
    found, at = [], 0
    for line in text.splitlines(keepends=True):
        if at > BEFORE and 30 <= len(line.strip()) <= 60:
            found.append((at + len(line) - len(line.lstrip()), at + len(line.rstrip())))
        at += len(line)
    return text, random.Random(0).sample(found, count)


async def stroke(on: Replica, key: Key, prefix: str, suffix: str, session: str) -> None:
    """Sends one request and notes when its parts come."""
    stop = pb.StopRule(max_tokens=TOKENS, single_line=True)
    try:
        async for response in on.complete(prefix, 0, suffix=suffix, stop=stop, session=session, timeout=LONGEST):
            match response.WhichOneof("part"):
                case "started":
                    key.started = time.monotonic()
                    key.prompt, key.cached = response.started.prompt_tokens, response.started.cached_tokens
                case "delta":
                    key.first = key.first or time.monotonic()
                case "finished":
                    key.reason = response.finished.reason
    except grpc.aio.AioRpcError as error:
        key.error = error.code().name


async def typed(on: Replica, text: str, lines: list[tuple[int, int]], pace: float, session: str) -> list[Key]:
    """Types the lines."""
    keys, tasks = list[Key](), list[asyncio.Task[Any]]()
    due = time.monotonic()
    for begin, end in lines:
        for at in range(begin, end):
            due += pace
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            key = Key(cold=at == begin, sent=time.monotonic())
            keys.append(key)
            # The whole file up to the cursor: the service cuts it so that what is cached stays valid.
            tasks.append(asyncio.create_task(stroke(on, key, text[:at], text[end : end + 2_000], session)))
            if key.cold:
                await tasks[-1]
                due = time.monotonic()
    await asyncio.wait_for(asyncio.gather(*tasks), 2 * LONGEST)
    return keys


def report(name: str, keys: list[Key], pace: float) -> None:
    """Prints what was measured beside what is asked."""
    warm = [key for key in keys if not key.cold]
    answered = [key for key in warm if key.first]
    superseded = sum(key.reason == pb.FINISH_REASON_SUPERSEDED for key in warm)
    in_time = sum(key.first - key.sent < pace for key in answered)
    print(
        f"{name}: {len(keys)} key strokes, {superseded} superseded, {in_time / len(warm):.0%} answered before the next"
    )
    row("  Started to first token, warm", milliseconds([key.first - key.started for key in answered]), "p95 150 ms")
    row("  key to first token, warm", milliseconds([key.first - key.sent for key in answered]))
    if errors := Counter(key.error for key in keys if key.error):
        row("  failed", ", ".join(f"{name} {count}" for name, count in errors.items()))
    cold = [key.first - key.sent for key in keys if key.cold and key.first]
    row("  key to first token, cold", f"p50 {percentile(cold, 0.5) * 1e3:.0f} ms")
    begun = [key for key in warm if key.prompt]
    prompt = sum(key.prompt for key in begun)
    row("  prompt tokens from the cache", f"{sum(key.cached for key in begun) / prompt:.1%}", "85 %")
    row("  tokens of a prompt", f"{prompt / len(begun):.0f}")


async def main(count: int, pace: float) -> None:
    text, lines = places(2 * count)
    async with replica() as on:
        await on.ready()
        report("superseding", await typed(on, text, lines[:count], pace, "editor"), pace)
        report("without superseding", await typed(on, text, lines[count:], pace, ""), pace)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=6, help="typed in either way")
    parser.add_argument("--pace", type=float, default=0.15, help="seconds between two keys; 0.15 are 80 words a minute")
    asked = parser.parse_args()
    asyncio.run(main(asked.lines, asked.pace))
