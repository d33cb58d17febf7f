"""What every operation needs: the services behind it, and what a request says besides its body."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import orjson
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from services.client import AsyncCodegraft
from services.gateway.api.models import ModelNames, Target
from services.gateway.config import GatewaySettings
from services.gateway.edge import body
from services.gateway.edge.problems import Refused

PROJECT_HEADER = "x-codegraft-project"
SESSION_HEADER = "x-codegraft-session"
_LONGEST = 300
"""Characters of a session."""

Ask = TypeVar("Ask", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Desk:
    """The services, and how requests to them are read."""

    client: AsyncCodegraft
    names: ModelNames
    settings: GatewaySettings

    async def read(self, request: Request, ask: type[Ask]) -> Ask:
        """The request's body; raises what :func:`services.gateway.edge.body.parse` does."""
        settings = self.settings
        return await body.parse(request, ask, most=settings.gateway_body_bytes, seconds=settings.gateway_body_seconds)

    async def target(self, request: Request, model: str) -> Target:
        """The project and the version that a request is for; raises what :meth:`ModelNames.target` does."""
        project: str = request.path_params.get("project") or request.headers.get(PROJECT_HEADER, "")
        return await self.names.target(model, project)


def session(request: Request, user: str | None = None) -> str:
    """The editor session that a request belongs to; empty for none.

    Raises:
        Refused: it is too long.
    """
    given = request.headers.get(SESSION_HEADER) or user or ""
    if len(given) > _LONGEST:
        raise Refused(400, "INVALID_ARGUMENT", f"X-Codegraft-Session is longer than {_LONGEST} characters.")
    return given


def answer(content: object, headers: Mapping[str, str] | None = None) -> Response:
    """An answer of one piece; its content is a dataclass or plain data."""
    return Response(orjson.dumps(content), headers=headers, media_type="application/json")
