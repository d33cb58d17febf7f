"""A console for tests: a browser's requests over real HTTP, and scripted services behind real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx2
import pytest

from codegraft.access.v1.access_pb2 import ROLE_OPERATOR, GetCallerResponse
from services.core.rpc.interceptors import CallInterceptor
from services.gateway.assembly import application, connect
from services.gateway.config import GatewaySettings
from services.gateway.server import serving
from tests.contract.console_world import KEY, Browser
from tests.unit.client.conftest import Fake


class Keys(grpc.aio.ServerInterceptor):
    """Notes with which key each call came, as long as it can be read: with the call grpc forgets it."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        self.seen.append(str(dict(details.invocation_metadata or ()).get("authorization", "")))
        return await continuation(details)


@pytest.fixture
async def stranger() -> AsyncIterator[Browser]:
    """Nobody is signed in."""
    services = Fake()
    services.scripts["GetCaller"] = [GetCallerResponse(subject="keys/ops", role=ROLE_OPERATOR, all_projects=True)]
    keys = Keys()
    server = grpc.aio.server(interceptors=[keys, CallInterceptor()])
    server.add_generic_rpc_handlers((services,))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    settings = GatewaySettings(
        listen="127.0.0.1:0",
        drain_seconds=10,
        ingest_address=address,
        scanner_address=address,
        trainer_address=address,
        inference_address=address,
    )
    leaving = asyncio.Event()

    async def running() -> None:
        async with connect(settings) as client, serving(settings, application(settings, client)) as url:
            started.set_result(url)
            await leaving.wait()

    started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(running())
    await asyncio.wait((started, task), return_when=asyncio.FIRST_COMPLETED)
    url = started.result() if started.done() else task.result()
    async with httpx2.AsyncClient(base_url=str(url), timeout=20, verify=False, headers={"accept": "text/html"}) as http:
        yield Browser(http, services, keys.seen, leaving.set)
    leaving.set()
    await task
    await server.stop(None)


@pytest.fixture
async def browser(stranger: Browser) -> Browser:
    """Somebody is."""
    answer = await stranger.sign_in(KEY)
    assert answer.status_code == 303, answer.text
    return stranger
