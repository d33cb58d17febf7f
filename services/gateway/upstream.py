"""Whether the services answer, as any load balancer would ask them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from services.core.rpc.client import channel
from services.core.rpc.status import from_rpc
from services.gateway.config import GatewaySettings

_TIMEOUT = 2.0


@dataclass(frozen=True, slots=True)
class Health:
    """One service's."""

    service: str
    word: str
    """``serving``, ``not serving`` or ``unreachable``."""
    detail: str
    milliseconds: float


class HealthOfAll:
    """Asks the four of them."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._checks = {
            service: channel(getattr(settings, f"{service}_address"), settings).unary_unary(
                "/grpc.health.v1.Health/Check",  # the generated stub has no types
                request_serializer=HealthCheckRequest.SerializeToString,
                response_deserializer=HealthCheckResponse.FromString,
            )
            for service in ("ingest", "scanner", "trainer", "inference")
        }

    async def ask(self) -> list[Health]:
        """How they are now; takes at most two seconds."""
        return list(await asyncio.gather(*map(self._ask, self._checks)))

    async def _ask(self, service: str) -> Health:
        began = time.perf_counter()
        try:
            found = await self._checks[service](HealthCheckRequest(), timeout=_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            return Health(service, "unreachable", from_rpc(error).message, 0)
        word = "serving" if found.status == HealthCheckResponse.SERVING else "not serving"
        return Health(service, word, "", 1000 * (time.perf_counter() - began))
