"""Which workers there are, idle ones too: each says so in a record, and again and again as long as it is there."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import grpc

from codegraft.access.v1 import worker_pb2 as pb
from codegraft.access.v1.worker_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server
from services.core import log
from services.core.errors import Aborted, CodegraftError, NotFound, ResourceExists, StateUnavailable
from services.core.rpc.server import Registration
from services.core.state import StateStore, Table

_LOOK = 1.0
"""Seconds between two looks at what the workers of this process do."""
_FAREWELL = 2.0
"""Seconds that taking the records away may take at the end; what is left of them goes with the lease."""
_logger = log.get(__name__)


class Runner(Protocol):
    """What is known of a worker; see :class:`services.core.jobs.runner.JobRunner`."""

    kind: str
    worker_id: str
    job: str


class Workers:
    """The workers of one service: those of this process say that they are there, those of all replicas are listed.

    Args:
        state: the service's bucket.
        runners: the workers of this process.
        lease: seconds of silence after which a worker counts as gone.
    """

    def __init__(self, state: StateStore, runners: Sequence[Runner], lease: timedelta) -> None:
        self._table = Table(state, pb.Worker, missing=NotFound)
        self._runners, self._lease = runners, lease
        self._told: dict[str, tuple[str, float]] = {}
        """By worker: its job as it was last told, and when by the monotonic clock."""

    def service(self) -> Registration:
        """WorkerService, for services/core/rpc/server."""
        servicer = _Servicer(self)
        return add_WorkerServiceServicer_to_server, servicer, "codegraft.access.v1.WorkerService"

    async def page(self, page_size: int, page_token: str) -> tuple[list[pb.Worker], str]:
        """One page of the workers that are there, by name, and the token of the next.

        Raises:
            InvalidPageSize, InvalidPageToken, StateUnavailable.
        """
        return await self._table.page("", page_size, page_token, where=self._is_there)

    async def run(self) -> None:
        """Says that they are there until it is cancelled; then that they are not."""
        try:
            while True:
                try:
                    await self._tell()
                except CodegraftError as error:
                    _logger.warning("it cannot be said that the workers are there", error=error.message)
                await asyncio.sleep(_LOOK)
        finally:
            with contextlib.suppress(NotFound, Aborted, StateUnavailable, TimeoutError):
                async with asyncio.timeout(_FAREWELL):
                    for worker in self._told:
                        await self._table.delete(worker)

    async def _tell(self) -> None:
        renewed = False
        for runner in self._runners:
            job, at = self._told.get(_name(runner), ("", 0.0))
            is_due = time.monotonic() - at > self._lease.total_seconds() / 3
            if is_due or job != runner.job or _name(runner) not in self._told:
                await self._write(runner)
                renewed = True
        if renewed:
            await self._bury()

    async def _write(self, runner: Runner) -> None:
        name, job = _name(runner), runner.job

        def is_here(worker: pb.Worker) -> None:
            worker.job = job
            worker.seen_time.GetCurrentTime()

        try:
            await self._table.mutate(name, is_here)
        except NotFound:
            made = pb.Worker(name=name, kind=runner.kind)
            made.create_time.GetCurrentTime()
            is_here(made)
            with contextlib.suppress(ResourceExists):  # an answer was lost before
                await self._table.create(made)
        self._told[name] = job, time.monotonic()

    async def _bury(self) -> None:
        """Takes the records of those away that ended without a word."""
        for worker in await self._table.all():
            if not self._is_there(worker):
                with contextlib.suppress(NotFound, Aborted):  # another replica did, or it is there after all
                    await self._table.delete(worker.name, etag=worker.etag)

    def _is_there(self, worker: pb.Worker) -> bool:
        return datetime.now(UTC) - worker.seen_time.ToDatetime(tzinfo=UTC) < self._lease


class _Servicer(WorkerServiceServicer):
    """See the proto for what every call does and which errors it has."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    async def ListWorkers(
        self, request: pb.ListWorkersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListWorkersResponse:
        found, next_token = await self._workers.page(request.page_size, request.page_token)
        return pb.ListWorkersResponse(workers=found, next_page_token=next_token)


def _name(runner: Runner) -> str:
    return f"workers/{runner.worker_id}"
