"""/health: whether requests can be answered now; /health/services: how each service behind the gateway answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from starlette.requests import Request
from starlette.responses import Response

from services.client import AsyncCodegraft
from services.core.errors import Unavailable
from services.core.rpc.client import channel
from services.core.rpc.status import from_rpc
from services.gateway.api import desk
from services.gateway.config import GatewaySettings
from services.gateway.upstream import HealthOfAll

_TIMEOUT = 2.0


@dataclass(frozen=True, slots=True)
class Health:
    """Answer of /health, as llama.cpp's server gives it."""

    status: Literal["ok"]


@dataclass(frozen=True, slots=True)
class ServicesHealth:
    """Answer of /health/services: by service ``serving``, ``not serving`` or ``unreachable``."""

    services: dict[str, str]


class HealthDesk:
    """The operations."""

    def __init__(self, client: AsyncCodegraft, settings: GatewaySettings) -> None:
        self._client, self._all = client, HealthOfAll(settings)
        self._check = channel(settings.inference_address, settings).unary_unary(  # the generated stub has no types
            "/grpc.health.v1.Health/Check",
            request_serializer=HealthCheckRequest.SerializeToString,
            response_deserializer=HealthCheckResponse.FromString,
        )

    async def health(self, request: Request) -> Response:
        """GET /health; 503 while inference does not serve."""
        try:
            found = await self._check(HealthCheckRequest(), timeout=_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"inference does not answer: {from_rpc(error).message}", retry_after=1.0) from None
        if found.status != HealthCheckResponse.SERVING:
            raise Unavailable("inference does not serve now", retry_after=1.0)
        return desk.answer(Health("ok"))

    async def services(self, request: Request) -> Response:
        """GET /health/services; for whoever has a key, since it tells more of the house than strangers need to know."""
        await self._client.keys.whoami()
        return desk.answer(ServicesHealth({one.service: one.word for one in await self._all.ask()}))
