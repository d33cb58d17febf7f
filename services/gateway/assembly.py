"""The parts of the gateway, put together as one ASGI application."""

from __future__ import annotations

from collections.abc import Sequence

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp

from services.client import Addresses, AsyncCodegraft
from services.client.access import Access
from services.core.rpc.tls import ClientFiles
from services.gateway.api.desk import Desk
from services.gateway.api.models import ModelNames
from services.gateway.api.openapi import describe
from services.gateway.api.operations import operations
from services.gateway.config import GatewaySettings
from services.gateway.console import assembly as console
from services.gateway.edge.call import Edge

PREFIX = "/projects/{project}"
"""What may stand before every address: for clients that have a base address to set and no model."""


def connect(settings: GatewaySettings) -> AsyncCodegraft:
    """The client of the services behind it; within the event loop that uses it. It has no key: callers bring theirs."""
    addresses = Addresses(
        settings.ingest_address, settings.scanner_address, settings.trainer_address, settings.inference_address
    )
    files = (settings.tls_cert_file, settings.tls_key_file)
    tls = ClientFiles(settings.tls_ca_file, *files) if settings.tls_ca_file else None
    return AsyncCodegraft(addresses, access=Access(tls=tls))


def application(settings: GatewaySettings, client: AsyncCodegraft) -> ASGIApp:
    """The application; the client stays the caller's."""
    pages = console.routes(client, settings)
    router = Router([*_routes(Desk(client, ModelNames(client), settings)), *pages], redirect_slashes=False)
    return Edge(router, settings)


def _routes(desk: Desk) -> Sequence[BaseRoute]:
    table = operations(desk)
    described = orjson.dumps(describe(table))

    async def openapi(request: Request) -> Response:
        return Response(described, media_type="application/json")

    routes = [Route("/openapi.json", openapi, methods=["GET"])]
    for prefix in ("", PREFIX):
        for operation in table:
            path = prefix + operation.path.replace("{model}", "{model:path}")
            routes.append(Route(path, operation.endpoint, methods=[operation.method]))
    return routes
