"""Two hundred editors: ``python -m bench.sessions [--sessions N] [--keys K] [--seconds S]``.

So many sessions type 5 keys a second each, against the local stack: the real gateway, the real inference, SmolLM2-135M.
The machine is overloaded on purpose. What is asked: every answer is that of its own request, what was superseded or
hung up on ends as such, nothing is answered with 5xx, nothing hangs, and afterwards nothing is held any more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from bench.figures import percentile, row
from bench.typists import Ask, Office, replayed, type_all
from services.client import Addresses, AsyncCodegraft
from services.client.access import Access

SESSIONS, KEYS_A_SECOND, SECONDS, TOKENS = 200, 5.0, 20.0, 16
PATIENCE = 180.0
SAMPLE = 60
"""Answers that are asked for again."""
HELD = (
    "codegraft_inference_running",
    "codegraft_inference_queue_depth",
    "codegraft_inference_kv_use_ratio",
    "codegraft_inference_streams",
    "http_server_active_requests",
)
"""Figures that are 0 when nothing runs."""
CODEGRAFT = [sys.executable, "-m", "services.cli.main"]


def held(urls: list[str]) -> dict[str, float]:
    """Those figures that are not 0; the scrapes are no requests of the gateway's."""
    found: dict[str, float] = {}
    for url in urls:
        for line in urllib.request.urlopen(url, timeout=10).read().decode().splitlines():
            name, _, value = line.rpartition(" ")
            if name.partition("{")[0] in HELD and float(value):
                found[name] = float(value)
    return found


async def measure(sessions: int, keys_a_second: float, seconds: float, described: dict[str, object], key: str) -> bool:
    """Types, and prints what came of it; whether all is as it should be."""
    services = {service["name"]: service for service in described["services"]}  # type: ignore[attr-defined]
    addresses = {name: service["address"] for name, service in services.items()}
    office = Office(int(addresses.pop("gateway").rpartition(":")[2]), key, "demo", TOKENS)
    async with AsyncCodegraft(Addresses(**addresses), access=Access(key)) as client:
        await client.projects.create("demo")
        async for _ in client.completions.complete("demo", prefix="x", max_tokens=1):
            pass  # the model is loaded from here on
    typing = await type_all(office, sessions=sessions, keys_a_second=keys_a_second, seconds=seconds, patience=PATIENCE)
    print(f"{sessions} sessions, {keys_a_second:g} keys a second each for {seconds:g} s: {len(typing.asks)} requests")
    for outcome, count in typing.outcomes().most_common():
        row(f"  {outcome}", str(count))
    row("  keys that came late", str(typing.late))
    whole = typing.whole()
    times = [ask.seconds for ask in whole]
    row("  whole answers took", f"p50 {percentile(times, 0.5):.2f} s, p95 {percentile(times, 0.95):.2f} s")
    await asyncio.sleep(2)
    left = await asyncio.to_thread(held, [services[name]["metrics"] for name in ("inference", "gateway")])
    row("  held two seconds after the last", str(left or "nothing"), "nothing")
    others: list[tuple[Ask, Ask]] = []
    sample = random.Random(0).sample(whole, min(SAMPLE, len(whole)))
    count = await replayed(office, sample, lambda ask, again: others.append((ask, again)))
    row("  other answers when asked again", f"{len(others)} of {count}", "0")
    for ask, again in others[:5]:
        print(f"    {ask.prompt[-40:]!r}: {ask.text!r}, again {again.text!r}")
    faults = typing.faults()
    row("  faults", str(len(faults)), "0")
    for fault in faults[:10]:
        print(f"    {fault}")
    return not (left or others or faults)


def main() -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=SESSIONS)
    parser.add_argument("--keys", type=float, default=KEYS_A_SECOND)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="codegraft-bench-") as folder:
        up = [*CODEGRAFT, "up", "--detach", "--json", "--data", folder]
        described = json.loads(subprocess.run(up, capture_output=True, text=True, check=True).stdout)
        try:
            key = json.loads((Path(folder) / "credentials.json").read_text())["api_key"]
            is_right = asyncio.run(measure(given.sessions, given.keys, given.seconds, described, key))
        finally:
            subprocess.run([*CODEGRAFT, "down", "--data", folder], check=True, stderr=subprocess.DEVNULL)
        logs = {log.stem: log.read_text() for log in (Path(folder) / "logs").glob("*.log")}
    errors = {name: count for name, text in logs.items() if (count := text.count('"level": "error"'))}
    row("  errors in logs", str(errors or "none"), "none")
    for text in logs.values():
        for line in text.splitlines():
            if '"level": "error"' in line:
                print(f"    {line}")
    return int(not is_right or bool(errors))


if __name__ == "__main__":
    sys.exit(main())
