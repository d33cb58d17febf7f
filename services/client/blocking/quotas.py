# Made by make_blocking.py from services/client/aio; change it there.
"""What projects and keys may use, and what they use of it."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from codegraft.access.v1 import quota_pb2, quota_pb2_grpc
from services.client.blocking.caller import Caller


class Quotas:
    """Limits of projects and keys. Projects are named ``projects/acme``, keys ``keys/ci``."""

    def __init__(self, channel: grpc.Channel, channels: Sequence[grpc.Channel], caller: Caller) -> None:
        self._stub = quota_pb2_grpc.QuotaServiceStub(channel)
        self._usage = quota_pb2_grpc.UsageServiceStub(channel)
        self._counting = [quota_pb2_grpc.UsageServiceStub(each) for each in channels]
        self._caller = caller

    def get(self, owner: str) -> quota_pb2.GetQuotaResponse:
        """What was set for a project or a key, and what counts.

        Raises:
            InvalidName, ProjectNotFound, KeyNotFound, PermissionDenied.
        """
        request = quota_pb2.GetQuotaRequest(name=f"{owner}/quota")
        return self._caller.unary(self._stub.GetQuota, request, repeat=True)

    def set(self, owner: str, limits: quota_pb2.Limits, *, etag: str = "") -> quota_pb2.SetQuotaResponse:
        """Replaces what was set for a project or a key.

        Args:
            limits: unset fields leave it to the default, -1 is no limit.
            etag: of the quota that is to be replaced; empty replaces any.

        Raises:
            InvalidName, InvalidArgument, ProjectNotFound, KeyNotFound, PermissionDenied, EtagMismatch.
        """
        quota = quota_pb2.Quota(name=f"{owner}/quota", limits=limits, etag=etag)
        request = quota_pb2.SetQuotaRequest(quota=quota)
        return self._caller.unary(self._stub.SetQuota, request, repeat=not etag)

    def usage(self, owner: str) -> quota_pb2.Limits:
        """What a project or a key uses, as the four services count it; of requests they know the same, a moment apart.

        Raises:
            InvalidName, PermissionDenied, Unavailable.
        """
        used = quota_pb2.Limits()
        for stub in self._counting:
            request = quota_pb2.GetUsageRequest(name=f"{owner}/quota")
            found = (self._caller.unary(stub.GetUsage, request, repeat=True)).used
            if found.HasField("requests_per_minute"):
                found.requests_per_minute = max(found.requests_per_minute, used.requests_per_minute)
            used.MergeFrom(found)
        return used

    def stored(self, owner: str) -> quota_pb2.StorageUsage:
        """What a project or a key has stored, in bytes by what they are.

        Raises:
            InvalidName, PermissionDenied, Unavailable.
        """
        request = quota_pb2.GetUsageRequest(name=f"{owner}/quota")
        return (self._caller.unary(self._usage.GetUsage, request, repeat=True)).storage
