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
from services.ingest.deletions import Deletions

Context = grpc.aio.ServicerContext[Any, Any]
EVERYTHING = "projects/-"


class AuditServicer(AuditServiceServicer):
    """See the proto for what every call does and which errors it has."""

    def __init__(self, audit: AuditLog, deletions: Deletions) -> None:
        self._audit, self._deletions = audit, deletions

    async def ListAuditRecords(
        self, request: pb.ListAuditRecordsRequest, context: Context
    ) -> pb.ListAuditRecordsResponse:
        project = "" if request.parent == EVERYTHING else request.parent
        if request.parent != EVERYTHING:
            names.parse(names.PROJECT, project, field="parent")
        since = request.start_time.ToDatetime(UTC) if request.HasField("start_time") else None
        projects = current().projects
        if projects is not None and (began := await self._deletions.began_anew(project)) is not None:
            since = max(since or began, began)  # before that it was another project of this name
        found, token = await self._audit.page(project, request.page_size, request.page_token, since, projects)
        return pb.ListAuditRecordsResponse(records=found, next_page_token=token)
