# Made by make_blocking.py from services/client/aio; change it there.
"""API keys, who the caller is, and the audit log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta

import grpc

from codegraft.access.v1 import access_pb2, access_pb2_grpc, audit_pb2, audit_pb2_grpc
from services.client.blocking.caller import Caller, new_request_id
from services.client.blocking.ingest import project_name


class Keys:
    """API keys. A caller makes and ends those that may do no more than itself."""

    def __init__(self, channel: grpc.Channel, caller: Caller) -> None:
        self._stub = access_pb2_grpc.AccessServiceStub(channel)
        self._caller = caller

    def create(
        self,
        role: access_pb2.Role,
        *,
        projects: Sequence[str] = (),
        all_projects: bool = False,
        key_id: str = "",
        title: str = "",
        expires: datetime | None = None,
        request_id: str = "",
    ) -> tuple[access_pb2.Key, str]:
        """A new key, and what its user sends, which is shown only here.

        Args:
            projects: where it may do that; ids or full names.
            all_projects: everywhere, in place of projects.
            expires: when it ends by itself; never when None. With its time zone.

        Raises:
            PermissionDenied: the caller may not do so much itself.
            InvalidName, InvalidArgument, ResourceExists.
        """
        key = access_pb2.Key(
            title=title, role=role, projects=[project_name(each) for each in projects], all_projects=all_projects
        )
        if expires is not None:
            key.expire_time.FromDatetime(expires)
        request = access_pb2.CreateKeyRequest(key_id=key_id, key=key, request_id=request_id or new_request_id())
        created = self._caller.unary(self._stub.CreateKey, request, repeat=True)
        return created.key, created.secret

    def list(self, page_size: int = 0) -> Iterator[access_pb2.Key]:
        """Every key whose projects are all the caller's, by name."""
        request = access_pb2.ListKeysRequest(page_size=page_size)
        for page in self._caller.pages(self._stub.ListKeys, request):
            for key in page.keys:
                yield key

    def rotate(self, name: str, *, overlap: timedelta | None = None) -> tuple[access_pb2.Key, str]:
        """The key with a new secret, and that.

        Args:
            name: id or full name.
            overlap: how long the old one works on; a day when None.

        Raises:
            KeyNotFound, KeyRevoked, PermissionDenied.
        """
        request = access_pb2.RotateKeyRequest(name=key_name(name))
        if overlap is not None:
            request.overlap.FromTimedelta(overlap)
        rotated = self._caller.unary(self._stub.RotateKey, request, repeat=False)
        return rotated.key, rotated.secret

    def revoke(self, name: str) -> access_pb2.Key:
        """Ends a key for ever. Raises KeyNotFound, PermissionDenied."""
        request = access_pb2.RevokeKeyRequest(name=key_name(name))
        return (self._caller.unary(self._stub.RevokeKey, request, repeat=True)).key

    def whoami(self) -> access_pb2.GetCallerResponse:
        """Who the caller is, and what it may do."""
        return self._caller.unary(self._stub.GetCaller, access_pb2.GetCallerRequest(), repeat=True)


class Audit:
    """Who changed what."""

    def __init__(self, channel: grpc.Channel, caller: Caller) -> None:
        self._stub = audit_pb2_grpc.AuditServiceStub(channel)
        self._caller = caller

    def list(
        self, project: str = "-", *, since: datetime | None = None, page_size: int = 0
    ) -> Iterator[audit_pb2.AuditRecord]:
        """The calls that changed something in a project ("-": in all of them, and elsewhere), oldest first.

        Args:
            since: leaves out what is older. With its time zone.
        """
        parent = "projects/-" if project == "-" else project_name(project)
        request = audit_pb2.ListAuditRecordsRequest(parent=parent, page_size=page_size)
        if since is not None:
            request.start_time.FromDatetime(since)
        for page in self._caller.pages(self._stub.ListAuditRecords, request):
            for record in page.records:
                yield record


def key_name(key: str) -> str:
    """``keys/ci`` for "ci" and for itself."""
    return key if "/" in key else f"keys/{key}"
