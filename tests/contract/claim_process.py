"""A process of the trainer, as far as room goes: claims some, says so, and holds it until it is killed."""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta

from services.core.auth.keyring import BUCKET
from services.core.nats_connection import connect
from services.core.quota.limits import Defaults
from services.core.quota.quotas import Quotas
from services.core.quota.storage import Stored, artifact_ended, told
from services.core.state import MemoryState
from services.core.state.nats import NatsState
from services.core.store import MemoryStore


async def main(url: str, user: str, password: str, project: str, amount: int, limit: int, lasts: float) -> None:
    """Holds the amount, of a claim that is void after so many seconds without its process."""
    connection = await connect(url, user=user, password=password)
    quotas = Quotas(MemoryState(), Defaults(storage_bytes=limit))
    places = Stored(MemoryStore(), told).places(
        quotas, NatsState(connection, BUCKET), artifact_ended, timedelta(seconds=lasts)
    )
    async with places.claim([project], f"{project}/datasets/d", amount):
        print("holds", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:5], int(sys.argv[5]), int(sys.argv[6]), float(sys.argv[7])))
