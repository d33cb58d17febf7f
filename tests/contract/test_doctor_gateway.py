"""The doctor looks at real gateways: sound ones, and such as are broken in each way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse

from codegraft.access.v1 import access_pb2 as pb
from codegraft.access.v1 import access_pb2_grpc
from services.cli.control.installation import Installation
from services.cli.doctor import gateway
from services.cli.doctor.check import Result
from services.core.config import CoreSettings
from services.core.errors import Unauthenticated
from services.core.rpc.interceptors import CallInterceptor
from services.core.version import release
from tests.certificates import Authority

pytest_plugins = ["tests.contract.gateway_fixtures"]

KEY = "good"


class Access(access_pb2_grpc.AccessServiceServicer):
    """Lets one key in."""

    async def GetCaller(self, request: pb.GetCallerRequest, context: Any) -> pb.GetCallerResponse:
        if dict(context.invocation_metadata()).get("authorization") != f"Bearer {KEY}":
            raise Unauthenticated("no key", hint="Send one.")
        return pb.GetCallerResponse(subject="keys/doctor")


@dataclass
class Services:
    """All four behind one address."""

    address: str
    health: health.aio.HealthServicer

    @property
    def settings(self) -> dict[str, str]:
        return {f"{name}_address": self.address for name in ("ingest", "scanner", "trainer", "inference")}


@pytest.fixture
async def services() -> AsyncIterator[Services]:
    server, checks = grpc.aio.server(interceptors=[CallInterceptor()]), health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    access_pb2_grpc.add_AccessServiceServicer_to_server(Access(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await checks.set("", HealthCheckResponse.SERVING)
    await server.start()
    yield Services(address, checks)
    await server.stop(None)


async def look(url: str, **settings: Any) -> tuple[dict[str, tuple[Result, str]], str]:
    place = Installation(CoreSettings(**settings))
    checks, version = await asyncio.to_thread(gateway.check, place, url)
    assert all(check.hint for check in checks if check.result is not Result.OK)
    return {check.name: (check.result, check.found) for check in checks}, version


async def test_a_sound_gateway_and_what_is_behind_it(gateways: Any, services: Services) -> None:
    made = await gateways(**services.settings)
    found, version = await look(made.url, api_key=KEY)
    assert version == release()
    assert found == {
        "gateway": (Result.OK, f"answers on {made.url}"),
        "clock of gateway": (Result.OK, "agrees with this machine's"),
        "behind the gateway": (Result.OK, "ingest, scanner, trainer, inference serve"),
    }
    found, _ = await look(made.url, api_key="other")
    assert found["behind the gateway"][0] is Result.WARNING
    await services.health.set("", HealthCheckResponse.NOT_SERVING)
    found, _ = await look(made.url, api_key=KEY)
    assert found["gateway"] == (Result.FAILED, f"{made.url} answers 503: inference does not serve now")
    assert found["behind the gateway"][1].startswith("ingest not serving, scanner not serving")


async def test_its_certificate_is_looked_at_and_no_key_goes_to_a_stranger(
    gateways: Any, services: Services, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.sign("gateway")
    made = await gateways(gateway_cert_file=cert, gateway_key_file=key, **services.settings)
    found, version = await look(made.url, api_key=KEY, tls_ca_file=authority.file)
    assert found["behind the gateway"][0] is Result.OK and version == release()
    assert found["gateway's certificate"][0] is Result.WARNING and "0 days" in found["gateway's certificate"][1]
    found, version = await look(made.url, api_key=KEY)
    assert found["gateway"][0] is Result.OK and version == release(), "the rest is told all the same"
    assert found["gateway's certificate"][0] is Result.FAILED and "not trusted" in found["gateway's certificate"][1]
    assert found["behind the gateway"][0] is Result.WARNING, "without the key"
    found, _ = await look(made.url.replace("127.0.0.1", "127.0.0.2"), api_key=KEY, tls_ca_file=authority.file)
    assert found["gateway"][0] is Result.FAILED


async def test_one_that_is_away_or_something_else(services: Services) -> None:
    found, version = await look("http://127.0.0.1:1")
    assert found["gateway"][0] is Result.FAILED and "refused" in found["gateway"][1] and not version
    found, _ = await look("code.example:443")
    assert found["gateway"] == (Result.FAILED, "'code.example:443' is no address")
    found, _ = await look(f"http://{services.address}")  # gRPC
    assert found["gateway"][0] is Result.FAILED
