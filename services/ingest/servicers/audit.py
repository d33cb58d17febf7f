"""AuditService."""

from __future__ import annotations

from datetime import UTC
from typing import Any

import grpc

from codegraft.access.v1 import audit_pb2 as pb
from codegraft.access.v1.audit_pb2_grpc import AuditServiceServicer
from services.core import names
from services.core.audit.log import AuditLog
from services.core.auth.caller import current

Context = grpc.aio.ServicerContext[Any, Any]
EVERYTHING = "projects/-"


class AuditServicer(AuditServiceServicer):
    """See the proto for what every call does and which errors it has."""

    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit

    async def ListAuditRecords(
        self, request: pb.ListAuditRecordsRequest, context: Context
    ) -> pb.ListAuditRecordsResponse:
        project = "" if request.parent == EVERYTHING else request.parent
        if request.parent != EVERYTHING:
            names.parse(names.PROJECT, project, field="parent")
        since = request.start_time.ToDatetime(UTC) if request.HasField("start_time") else None
        found, token = await self._audit.page(project, request.page_size, request.page_token, since, current().projects)
        return pb.ListAuditRecordsResponse(records=found, next_page_token=token)
