"""The callers of `bench.streams`, in a process of their own: ``python -m bench.callers ADDRESS``.

For each line on standard input they run all streams, and print how many tokens came.
"""

from __future__ import annotations

import asyncio
import sys

import grpc

from bench.streams import LONGEST, TOKENS, prompts
from codegraft.inference.v1 import completion_pb2 as pb
from codegraft.inference.v1 import completion_pb2_grpc
from services.core.rpc.client import OPTIONS


async def main(address: str) -> None:
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)

        async def one(prefix: str) -> int:
            request = pb.CompleteRequest(
                parent="projects/bench",
                prompt=pb.CodePrompt(path="bench.py", prefix=prefix),
                stop=pb.StopRule(max_tokens=TOKENS),
            )
            responses = stub.Complete(request, timeout=LONGEST)
            return sum([response.delta.tokens async for response in responses])

        while await asyncio.to_thread(sys.stdin.readline):
            print(sum(await asyncio.gather(*(one(prefix) for prefix in prompts()))), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
