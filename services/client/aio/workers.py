"""Who works on scans and runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import grpc

from codegraft.access.v1 import worker_pb2, worker_pb2_grpc
from services.client.aio.caller import Caller


class Workers:
    """The workers of the services that have jobs."""

    def __init__(self, channels: Sequence[grpc.aio.Channel], caller: Caller) -> None:
        self._stubs = [worker_pb2_grpc.WorkerServiceStub(channel) for channel in channels]
        self._caller = caller

    async def list(self, page_size: int = 0) -> AsyncIterator[worker_pb2.Worker]:
        """Every worker that is there, idle or not: those of scans, then those of runs. For keys of all projects."""
        for stub in self._stubs:
            request = worker_pb2.ListWorkersRequest(page_size=page_size)
            async for page in self._caller.pages(stub.ListWorkers, request):
                for worker in page.workers:
                    yield worker
