"""The parts of the console, put together."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from services.client import AsyncCodegraft
from services.gateway.config import GatewaySettings
from services.gateway.console import (
    credentials,
    dataset,
    keys,
    playground,
    projects,
    run,
    serving,
    sources,
    static_files,
    system,
    training,
    uploads,
    verdicts,
)
from services.gateway.console.login import Login
from services.gateway.console.pages import Pages
from services.gateway.console.session import PATH, Vault
from services.gateway.console.visit import House, Visit
from services.gateway.edge.problems import Refused

_ROOMS = (
    projects,
    sources,
    uploads,
    credentials,
    dataset,
    verdicts,
    training,
    run,
    serving,
    playground,
    system,
    keys,
)


def routes(client: AsyncCodegraft, settings: GatewaySettings) -> Sequence[BaseRoute]:
    """All addresses below :data:`PATH`, and the front door."""
    house = House(client, settings, Pages(), Vault(settings.gateway_console_key.get_secret_value()))
    below = [route for room in _ROOMS for route in room.routes(house)]
    below.append(house.route("/{rest:path}", _nothing))
    return [Route("/", _front_door, methods=["GET"]), static_files.route(), *Login(house).routes(), *below]


async def _nothing(visit: Visit) -> Response:
    raise Refused(404, "NOT_FOUND", "There is no such page.")


async def _front_door(request: Request) -> Response:
    return RedirectResponse(PATH, 303)
