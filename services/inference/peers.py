"""What inference asks of other services: ingest which projects there are, the trainer what is best."""

from __future__ import annotations

import asyncio
import contextvars
import time
from datetime import timedelta

import grpc

from codegraft.ingest.v1 import project_pb2, project_pb2_grpc
from codegraft.trainer.v1 import run_pb2, run_pb2_grpc
from services.core import log
from services.core.errors import CodegraftError, NotFound
from services.core.rpc.status import from_rpc
from services.inference.policy import Best

_TIMEOUT = 3.0
_REMEMBERED = 60.0
"""Seconds until a project that is there is asked for again."""
_AGAIN = 5.0
"""Seconds until one is asked for again of which ingest said nothing."""
_MOST = 10_000
"""Projects that are remembered."""
_logger = log.get("inference.peers")


class IngestProjects:
    """The projects, as ingest knows them.

    One that was there is asked for again every minute, and nobody waits for that: an ingest that has lost its own
    servers is slow to say so, and completions go on without it.
    """

    def __init__(self, ingest: grpc.aio.Channel) -> None:
        self._stub = project_pb2_grpc.ProjectServiceStub(ingest)
        self._due: dict[str, float] = {}
        """When to ask again for those that are taken to be there, on the monotonic clock; the oldest first."""
        self._unsaid: set[str] = set()
        """Those of them of which ingest never said so."""
        self._asking: set[asyncio.Task[bool]] = set()

    async def exists(self, project: str) -> bool:
        """Whether there is a project of that name; completions go on when ingest does not answer."""
        due = self._due.get(project)
        if due is None:
            return await self._ask(project)
        if time.monotonic() >= due:
            self._due[project] = time.monotonic() + _AGAIN
            # A fresh context: the request's deadline is not the question's.
            task = asyncio.create_task(self._ask(project), context=contextvars.Context())
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        return True

    def confirmed(self, project: str) -> bool:
        """See :class:`services.inference.policy.Projects`."""
        return project in self._due and project not in self._unsaid

    def forget(self, project: str) -> None:
        """See :class:`services.inference.policy.Projects`."""
        self._due.pop(project, None)
        self._unsaid.discard(project)

    async def kept_since(self, project: str) -> float | None:
        """See :class:`services.inference.policy.Projects`. It is asked every time: off means off at once."""
        found = await self._get(project)
        if found is None or not found.keep_completions:
            return None
        # Earlier versions of ingest did not note the time.
        known = found.keep_completions_time if found.HasField("keep_completions_time") else found.create_time
        return known.ToNanoseconds() / 1e9

    async def _get(self, project: str) -> project_pb2.Project | None:
        request = project_pb2.GetProjectRequest(name=project)
        try:
            return (await self._stub.GetProject(request, timeout=_TIMEOUT)).project
        except grpc.aio.AioRpcError as error:
            known: CodegraftError = from_rpc(error)
            if isinstance(known, NotFound):
                return None
            raise known from None

    async def _ask(self, project: str) -> bool:
        again = _REMEMBERED
        try:
            if await self._get(project) is None:
                self.forget(project)
                return False
            self._unsaid.discard(project)
        except CodegraftError as error:
            _logger.warning("ingest does not say whether a project exists", project=project, error=str(error))
            again = _AGAIN
            if project not in self._due:
                self._unsaid.add(project)
        self._due.pop(project, None)
        self._due[project] = time.monotonic() + again
        if len(self._due) > _MOST:
            self.forget(next(iter(self._due)))
        return True


class TrainerBests:
    """The best checkpoints, as the trainer knows them."""

    def __init__(self, trainer: grpc.aio.Channel) -> None:
        self._stub = run_pb2_grpc.RunServiceStub(trainer)

    async def best(self, project: str, base_model: str) -> Best | None:
        """See :class:`services.inference.policy.BestSource`."""
        request = run_pb2.GetBestCheckpointRequest(parent=project, base_model=base_model)
        try:
            found = (await self._stub.GetBestCheckpoint(request, timeout=_TIMEOUT)).checkpoint
        except grpc.aio.AioRpcError as error:
            known: CodegraftError = from_rpc(error)
            if isinstance(known, NotFound):
                return None
            raise known from None
        loss = found.test_loss if found.HasField("test_loss") else None
        return Best(found.name, found.sha256, found.base_model, found.base_digest, loss)

    async def keep(self, checkpoint: str) -> None:
        """See :class:`services.inference.policy.BestSource`."""
        await self._keep(run_pb2.KeepCheckpointRequest(name=checkpoint, kept=True))

    async def hold(self, checkpoint: str, time: timedelta) -> None:
        """See :class:`services.inference.policy.BestSource`."""
        await self._keep(run_pb2.KeepCheckpointRequest(name=checkpoint, hold_seconds=int(time.total_seconds())))

    async def _keep(self, request: run_pb2.KeepCheckpointRequest) -> None:
        try:
            await self._stub.KeepCheckpoint(request, timeout=_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None
