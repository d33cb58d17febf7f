"""QuotaService."""

from __future__ import annotations

from typing import Any

import grpc

from codegraft.access.v1 import quota_pb2 as pb
from codegraft.access.v1.quota_pb2_grpc import QuotaServiceServicer
from services.core.auth.caller import current
from services.ingest.quotas import QuotaDesk

Context = grpc.aio.ServicerContext[Any, Any]


class QuotaServicer(QuotaServiceServicer):
    """See the proto for what every call does and which errors it has."""

    def __init__(self, desk: QuotaDesk) -> None:
        self._desk = desk

    async def GetQuota(self, request: pb.GetQuotaRequest, context: Context) -> pb.GetQuotaResponse:
        quota, effective = await self._desk.get(current(), request.name)
        return pb.GetQuotaResponse(quota=quota, effective=effective)

    async def SetQuota(self, request: pb.SetQuotaRequest, context: Context) -> pb.SetQuotaResponse:
        quota, effective = await self._desk.set(current(), request.quota)
        return pb.SetQuotaResponse(quota=quota, effective=effective)
