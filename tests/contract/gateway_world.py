"""What tests know of a gateway. Its fixtures are in gateway_fixtures.py."""

from __future__ import annotations

from dataclasses import dataclass

import httpx2

from tests.unit.client.conftest import Fake


@dataclass
class Gateway:
    """A gateway under test with what is around it."""

    url: str
    http: httpx2.AsyncClient
    """Its address is the base."""
    neighbours: Fake
    """Ingest and the trainer; inference, too, where there is no replica."""

    async def post(self, path: str, body: object, **headers: str) -> httpx2.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.http.post(path, json=body, headers=named)
