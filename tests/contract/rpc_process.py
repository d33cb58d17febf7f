"""The process that test_rpc_server.py starts: the real runner around a slow service."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import grpc

from services.core import errors, log, runtime
from services.core.config import CoreSettings
from services.core.rpc.server import serve


class Slow(grpc.GenericRpcHandler):
    """Answers after a while, or never stops."""

    def __init__(self) -> None:
        self.has_answered = asyncio.Event()

    def service(self, details: Any) -> Any:
        match details.method.rpartition("/")[2]:
            case "Second":
                return grpc.unary_unary_rpc_method_handler(self.second)
            case "Twenty":
                return grpc.unary_stream_rpc_method_handler(self.twenty)
            case "ForEver" | "WatchForEver":
                return grpc.unary_stream_rpc_method_handler(self.for_ever)

    async def second(self, request: bytes, context: Any) -> bytes:
        await asyncio.sleep(1)
        self.has_answered.set()
        return b"done"

    async def twenty(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        for number in range(20):
            yield b"%d" % number
            await asyncio.sleep(0.1)

    async def for_ever(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        while True:
            yield b"."
            await asyncio.sleep(0.05)


async def background() -> None:
    try:
        match os.environ.get("CODEGRAFT_TEST_BACKGROUND"):
            case "fail":
                raise errors.StateUnavailable("the background broke")
            case "return":
                return
        await asyncio.Event().wait()
    finally:
        log.get("test").info("background ended")


def add(servicer: Slow, server: grpc.aio.Server) -> None:
    server.add_generic_rpc_handlers((servicer,))


async def main(settings: CoreSettings) -> None:
    slow = Slow()
    after = {"test.Slow": slow.has_answered.wait()} if os.environ.get("CODEGRAFT_TEST_SERVING_AFTER") else {}
    await serve(settings, [(add, slow, "test.Slow")], background=[background], serving_after=after)


if __name__ == "__main__":
    sys.exit(runtime.run("test", CoreSettings, main))
