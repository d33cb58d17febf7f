"""A process of a service, as far as tokens go: takes what standard input tells it to, and says what it knows."""

from __future__ import annotations

import asyncio
import sys

from services.core.nats_connection import connect
from services.core.quota.limits import Defaults
from services.core.quota.nats import NatsChannel
from services.core.quota.quotas import Quotas
from services.core.state import MemoryState


async def main(url: str, user: str, password: str, owner: str, limit: int) -> None:
    """Of each line takes so many tokens, and answers with what is used then."""
    connection = await connect(url, user=user, password=password)
    quotas = Quotas(MemoryState(), Defaults(tokens_per_minute=limit), channel=NatsChannel(connection, "inference"))
    running = asyncio.create_task(quotas.run())
    while line := await asyncio.to_thread(sys.stdin.readline):
        quotas.tokens.correct([owner], int(line))
        print(quotas.tokens.used(owner), flush=True)
    running.cancel()
    await connection.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:5], int(sys.argv[5])))
