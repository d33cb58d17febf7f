"""Runs the gateway."""

from __future__ import annotations

from services.core.runtime import leave, run
from services.gateway.assembly import application, connect
from services.gateway.config import GatewaySettings
from services.gateway.server import serve


async def main(settings: GatewaySettings) -> None:
    """Serves until a signal."""
    async with connect(settings) as client:
        await serve(settings, application(settings, client))


if __name__ == "__main__":
    leave(run("gateway", GatewaySettings, main))
