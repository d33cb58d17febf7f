"""What the gateway's HTTP adds to a completion over direct gRPC: ``python -m bench.gateway``.

In front of an inference that answers at once. Many editors at the same time are bench/sessions.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from statistics import quantiles
from typing import Any

import grpc

from bench.http import Connection
from codegraft.inference.v1 import completion_pb2 as pb
from codegraft.inference.v1 import completion_pb2_grpc
from services.client import Addresses, AsyncCodegraft
from services.core import log
from services.core.models.catalogue import find
from services.core.rpc.interceptors import CallInterceptor

REQUESTS, ROUNDS = 100, 6
TOKENS = 16
CODE = "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fib"
clock = time.perf_counter


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
    completion_pb2_grpc.add_CompletionServiceServicer_to_server(Instant(), server)  # type: ignore[abstract]
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
        assert inference.stdout
        address = f"127.0.0.1:{int(inference.stdout.readline())}"
        environment = {**os.environ, "CODEGRAFT_INFERENCE_ADDRESS": address, "CODEGRAFT_LISTEN": "127.0.0.1:0"}
        pipes = {"stderr": subprocess.PIPE, "text": True, "env": environment}
        gateway = running.enter_context(subprocess.Popen([sys.executable, "-m", "services.gateway"], **pipes))
        running.callback(gateway.terminate)
        assert gateway.stderr
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


def percentile(values: list[float], share: int) -> float:
    """Of at least two values."""
    return quantiles(values, n=100, method="inclusive")[share - 1]


if __name__ == "__main__":
    overhead()
