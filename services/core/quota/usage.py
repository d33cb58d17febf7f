"""UsageService: what this service counts of quotas."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc

from codegraft.access.v1 import quota_pb2 as pb
from codegraft.access.v1.quota_pb2_grpc import UsageServiceServicer, add_UsageServiceServicer_to_server
from services.core import names
from services.core.auth.caller import Role, current
from services.core.errors import PermissionDenied
from services.core.quota.limits import Kind, message_of
from services.core.quota.quotas import Quotas
from services.core.quota.storage import Stored
from services.core.rpc.server import Registration

Context = grpc.aio.ServicerContext[Any, Any]
Count = Callable[[str], Awaitable[int | None]]
"""What an owner uses; None where that is not counted."""


def usage(quotas: Quotas, counts: Mapping[Kind, Count], stored: Stored | None = None) -> Registration:
    """The service, for services/core/rpc/server.

    Args:
        counts: what is counted besides requests and storage.
        stored: who counts storage.
    """
    servicer = UsageServicer(quotas, counts, stored)
    return add_UsageServiceServicer_to_server, servicer, "codegraft.access.v1.UsageService"


class UsageServicer(UsageServiceServicer):
    """See the proto for what every call does and which errors it has."""

    def __init__(self, quotas: Quotas, counts: Mapping[Kind, Count], stored: Stored | None = None) -> None:
        self._quotas, self._counts, self._stored = quotas, counts, stored

    async def GetUsage(self, request: pb.GetUsageRequest, context: Context) -> pb.GetUsageResponse:
        names.parse(names.KEY_QUOTA if request.name.startswith("keys/") else names.PROJECT_QUOTA, request.name)
        owner, caller = request.name.removesuffix("/quota"), current()
        of_project = owner.startswith("projects/")
        readable = caller.covers(frozenset({owner})) if of_project else caller.projects is None
        if owner != caller.subject and not (readable and (of_project or caller.role >= Role.OPERATOR)):
            raise PermissionDenied(
                f"{caller.subject} may not see what {owner} uses",
                field="name",
                hint="Ask for your own key's, for those of your projects, or as an operator of all projects.",
            )
        used = {Kind.REQUESTS: self._quotas.requests.used(owner)}
        used |= {kind: await count(owner) for kind, count in self._counts.items()}
        storage = None
        if self._stored is not None:
            storage = await self._stored.usage(owner)
            used[Kind.STORAGE] = sum(size for _, size in storage.ListFields())
        return pb.GetUsageResponse(used=message_of(used), storage=storage)
