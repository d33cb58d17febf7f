"""A gateway for tests: real HTTP, in front of a real replica of inference and scripted ingest and trainer."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import httpx2
import pytest

from codegraft.ingest.v1.project_pb2 import ListProjectsResponse, Project
from services.core.rpc.interceptors import CallInterceptor
from services.gateway.assembly import application, connect
from services.gateway.config import GatewaySettings
from services.gateway.server import serving
from tests.contract.gateway_world import Gateway
from tests.contract.inference_world import PROJECT, World
from tests.unit.client.conftest import Fake

pytest_plugins = ["tests.contract.inference_fixtures"]


@pytest.fixture
async def gateways() -> AsyncIterator[Callable[..., Any]]:
    """Starts gateways: in front of a replica, or of nothing but scripts."""
    async with contextlib.AsyncExitStack() as running:

        async def make(world: World | None = None, **fields: Any) -> Gateway:
            neighbours = Fake()
            neighbours.scripts["ListProjects"] = [ListProjectsResponse(projects=[Project(name=PROJECT)])]
            server = grpc.aio.server(interceptors=[CallInterceptor()])
            server.add_generic_rpc_handlers((neighbours,))
            address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            running.push_async_callback(server.stop, None)
            where = dict.fromkeys(("ingest_address", "scanner_address", "trainer_address"), address)
            where["inference_address"] = world.address if world else address
            settings = GatewaySettings(**{"listen": "127.0.0.1:0", "drain_seconds": 1, **where, **fields})
            client = await running.enter_async_context(connect(settings))
            url = await running.enter_async_context(serving(settings, application(settings, client)))
            http = await running.enter_async_context(httpx2.AsyncClient(base_url=url, timeout=20))
            return Gateway(url, http, neighbours)

        yield make


@pytest.fixture
async def gateway(gateways: Callable[..., Any], world: World) -> Gateway:
    made: Gateway = await gateways(world)
    return made
