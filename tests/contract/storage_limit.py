"""A limit of storage in the runtime of a test, set as ingest does it."""

from __future__ import annotations

import asyncio

from codegraft.access.v1.quota_pb2 import Limits, Quota
from services.core.auth.keyring import BUCKET
from services.core.quota.limits import Kind
from services.core.quota.quotas import table
from services.core.runtime import Runtime


async def limit_storage(runtime: Runtime, project: str, size: int | None) -> None:
    """Returns once it counts; None takes it away."""
    records, limits = table(runtime.state(BUCKET)), Limits(storage_bytes=size)
    if await records.find(f"{project}/quota") is None:
        await records.create(Quota(name=f"{project}/quota", limits=limits))
    else:
        await records.mutate(f"{project}/quota", lambda there: there.limits.CopyFrom(limits))
    following = asyncio.create_task(runtime.quotas.run())
    async with asyncio.timeout(5):
        while runtime.quotas.limit(Kind.STORAGE, project) != size:  # noqa: ASYNC110  # as a service sees it
            await asyncio.sleep(0.002)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
