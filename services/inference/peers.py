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
_logger = log.get("inference.peers")


class IngestProjects:
    """The projects, as ingest knows them; a found one is remembered for a minute."""

    def __init__(self, ingest: grpc.aio.Channel) -> None:
        self._stub = project_pb2_grpc.ProjectServiceStub(ingest)
        self._seen: dict[str, float] = {}

    async def exists(self, project: str) -> bool:
        """Whether there is a project of that name; completions go on when ingest does not answer."""
        if time.monotonic() - self._seen.get(project, -_REMEMBERED) < _REMEMBERED:
            return True
        try:
            await self._stub.GetProject(project_pb2.GetProjectRequest(name=project), timeout=_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            known = from_rpc(error)
            if isinstance(known, NotFound):
                return False
            _logger.warning("ingest does not say whether a project exists", project=project, error=str(known))
            return True
        self._seen[project] = time.monotonic()
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
