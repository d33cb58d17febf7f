"""Benchmarks of the gateway: ``python -m bench.gateway [overhead] [editors]``; both if none.

overhead: what HTTP adds to a completion over direct gRPC, in front of an inference that answers at once.
editors:  200 sessions of an editor that type 5 keys a second each, against the local stack and the real model.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from statistics import quantiles
from typing import Any

import grpc

from bench.http import Connection
from codegraft.inference.v1 import completion_pb2 as pb
from codegraft.inference.v1 import completion_pb2_grpc
from services.client import Addresses, AsyncCodegraft
from services.client.access import Access
from services.core import log
from services.core.models.catalogue import find
from services.core.rpc.interceptors import CallInterceptor

REQUESTS, ROUNDS = 100, 6
TOKENS = 16
SESSIONS, KEYS_A_SECOND, SECONDS = 200, 5.0, 20.0
CODE = "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fib"
CODEGRAFT = [sys.executable, "-m", "services.cli.main"]
clock = time.perf_counter


# --- what HTTP adds ---


class Instant(completion_pb2_grpc.CompletionServiceServicer):
    """Answers each request with so many tokens at once."""

    async def Complete(self, request: pb.CompleteRequest, context: Any) -> AsyncIterator[pb.CompleteResponse]:
        yield pb.CompleteResponse(started=pb.Started(completion_id="c-base", model="m", prompt_tokens=64))
        for _ in range(TOKENS):
            yield pb.CompleteResponse(delta=pb.Delta(text="word ", tokens=1))
        yield pb.CompleteResponse(finished=pb.Finished(reason=pb.FINISH_REASON_LENGTH))

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        response = pb.ListModelsResponse()
        response.models.add(id=find("").id)
        return response


async def instant() -> None:
    """Serves it until its input ends; tells the port."""
    log.configure("bench")  # to stderr: what nobody reads must not fill the pipe
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    completion_pb2_grpc.add_CompletionServiceServicer_to_server(Instant(), server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)


@contextlib.contextmanager
def behind() -> Iterator[tuple[str, int]]:
    """(gRPC address, HTTP port) of an instant inference and a gateway before it, each a process of its own."""
    program = "import asyncio; from bench.gateway import instant; asyncio.run(instant())"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with contextlib.ExitStack() as running:
        inference = running.enter_context(subprocess.Popen([sys.executable, "-c", program], text=True, **pipes))
        running.callback(inference.terminate)
        address = f"127.0.0.1:{int(inference.stdout.readline())}"
        environment = {**os.environ, "CODEGRAFT_INFERENCE_ADDRESS": address, "CODEGRAFT_LISTEN": "127.0.0.1:0"}
        pipes = {"stderr": subprocess.PIPE, "text": True, "env": environment}
        gateway = running.enter_context(subprocess.Popen([sys.executable, "-m", "services.gateway"], **pipes))
        running.callback(gateway.terminate)
        for line in gateway.stderr:
            if (told := json.loads(line)).get("url"):
                # Its log is read on, so that it never waits for a full pipe.
                subprocess.Popen(["cat"], stdin=gateway.stderr, stdout=subprocess.DEVNULL)
                yield address, int(told["url"].rpartition(":")[2])
                return


def overhead() -> None:
    """Seconds of the same completion over gRPC and over HTTP, in turns."""
    with behind() as (address, port):
        asyncio.run(_measure(address, port))


async def _measure(address: str, port: int) -> None:
    async with AsyncCodegraft(Addresses(*[address] * 4)) as client:
        http = await Connection.open(port)

        async def direct() -> None:
            async for _ in client.completions.complete("demo", prefix=CODE, max_tokens=TOKENS):
                pass

        async def whole() -> None:
            await http.post("/v1/completions", {"model": "demo", "prompt": CODE, "max_tokens": TOKENS})

        async def streamed() -> None:
            body = {"model": "demo", "prompt": CODE, "max_tokens": TOKENS, "stream": True}
            await http.post("/v1/completions", body)

        async def infill() -> None:
            await http.post("/projects/demo/infill", {"input_prefix": CODE, "n_predict": TOKENS})

        sides = {"gRPC": direct, "whole": whole, "stream": streamed, "infill": infill}
        rounds: dict[str, list[list[float]]] = {name: [] for name in sides}
        for _ in range(ROUNDS):
            for name, ask in sides.items():
                times = []
                for _ in range(REQUESTS):
                    began = clock()
                    await ask()
                    times.append(clock() - began)
                rounds[name].append(times)
        http.close()
    # The best round of each side: what else the machine does only slows.
    p50 = {name: min(percentile(times, 50) for times in each) for name, each in rounds.items()}
    p95 = {name: min(percentile(times, 95) for times in each) for name, each in rounds.items()}
    print(f"{TOKENS} tokens at once; milliseconds, the best of {ROUNDS} rounds of {REQUESTS} requests")
    for name in sides:
        added = "" if name == "gRPC" else f"; adds {1e3 * (p95[name] - p95['gRPC']):.2f} at p95"
        print(f"  {name:7} p50 {1e3 * p50[name]:.2f}  p95 {1e3 * p95[name]:.2f}{added}")


# --- editors ---


def editors() -> None:
    """Sessions that type; every key's request replaces the one before, by its session or by hanging up."""
    with tempfile.TemporaryDirectory(prefix="codegraft-bench-") as folder:
        up = [*CODEGRAFT, "up", "--detach", "--json", "--data", folder]
        described = json.loads(subprocess.run(up, capture_output=True, text=True, check=True).stdout)
        try:
            key = json.loads((Path(folder) / "credentials.json").read_text())["api_key"]
            asyncio.run(_against({service["name"]: service["address"] for service in described["services"]}, key))
        finally:
            subprocess.run([*CODEGRAFT, "down", "--data", folder], check=True, stderr=subprocess.DEVNULL)
            print(f"  errors in the gateway's log: {_errors(Path(folder) / 'logs' / 'gateway.log')}", flush=True)


async def _against(addresses: dict[str, str], key: str) -> None:
    port = int(addresses.pop("gateway").rpartition(":")[2])
    async with AsyncCodegraft(Addresses(**addresses), access=Access(key)) as client:
        await client.projects.create("demo")
        async for _ in client.completions.complete("demo", prefix="x", max_tokens=1):
            pass  # the model is loaded from here on
        await _type(port, key)
        streams = dict((await client.serving.get("demo")).status.streams)
        print(f"  running streams a second after the last key: {sum(streams.values())}")


async def _type(port: int, key: str) -> None:
    outcomes: Counter[str] = Counter()
    texts: dict[str, set[str]] = {}
    waits: list[float] = []
    began = clock()
    typing = [_session(number, port, key, outcomes, texts, waits) for number in range(SESSIONS)]
    late = sum(await asyncio.gather(*typing))
    seconds = clock() - began
    sent = sum(outcomes.values())
    print(f"{SESSIONS} sessions, {KEYS_A_SECOND:g} keys a second each: {sent} requests in {seconds:.0f} s")
    for outcome, count in outcomes.most_common():
        print(f"  {count:6} {outcome}")
    print(f"  {late} keys came late, because this program or the machine was busy")
    if len(waits) > 1:
        print(f"  whole answers: p50 {percentile(waits, 50):.2f} s, p95 {percentile(waits, 95):.2f} s")
    differing = [prefix for prefix, found in texts.items() if len(found) > 1]
    print(f"  {len(texts)} prefixes were answered whole, {len(differing)} with more than one text")
    await asyncio.sleep(1)


async def _session(
    number: int, port: int, key: str, outcomes: Counter[str], texts: dict[str, set[str]], waits: list[float]
) -> int:
    """Types through the code, once over and then anew. Every second session hangs up on the request before."""
    draw = random.Random(number)
    await asyncio.sleep(draw.random() / KEYS_A_SECOND)
    hangs_up, late, presses = number % 2 == 0, 0, int(SECONDS * KEYS_A_SECOND)
    running: set[asyncio.Task[None]] = set()
    begin, start = clock(), draw.randrange(10, 30)
    for press in range(presses):
        due = begin + press / KEYS_A_SECOND
        late += clock() > due + 1 / KEYS_A_SECOND
        await asyncio.sleep(max(0.0, due - clock()))
        prefix = CODE[: start + press % (len(CODE) - start)]
        if hangs_up:
            for task in running:
                task.cancel()
        task = asyncio.create_task(_ask(number, port, key, prefix, outcomes, texts, waits))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running, return_exceptions=True)
    return late


async def _ask(
    number: int,
    port: int,
    key: str,
    prefix: str,
    outcomes: Counter[str],
    texts: dict[str, set[str]],
    waits: list[float],
) -> None:
    began, outcome = clock(), "hung up"
    try:
        connection = await Connection.open(port)
        try:
            body = {"model": "demo", "prompt": prefix, "path": "a.py", "max_tokens": TOKENS}
            headers = {"X-Codegraft-Session": f"s{number}", "Authorization": f"Bearer {key}"}
            status, head, data = await connection.post("/v1/completions", body, headers)
        finally:
            connection.close()
        answer = json.loads(data)
        if status == 200:
            choice = answer["choices"][0]
            outcome = choice["codegraft_reason"].lower()
            if choice["codegraft_reason"] not in ("SUPERSEDED", "DEADLINE"):
                texts.setdefault(prefix, set()).add(choice["text"])
                waits.append(clock() - began)
        else:
            outcome = f"{status} {answer['error']['code']}"
            assert "retry-after" in head, answer
    except OSError as error:
        outcome = type(error).__name__
    finally:
        outcomes[outcome] += 1


def _errors(log: Path) -> int:
    return sum('"level": "error"' in line for line in log.read_text().splitlines())


def percentile(values: list[float], share: int) -> float:
    """Of at least two values."""
    return quantiles(values, n=100, method="inclusive")[share - 1]


if __name__ == "__main__":
    parts = {"overhead": overhead, "editors": editors}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*parts, []], metavar="|".join(parts))
    parser.add_argument("--sessions", type=int, default=SESSIONS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    arguments = parser.parse_args()
    SESSIONS, SECONDS = arguments.sessions, arguments.seconds
    for part in arguments.parts or parts:
        parts[part]()
