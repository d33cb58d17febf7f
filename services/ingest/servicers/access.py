"""AccessService."""

from __future__ import annotations

from typing import Any

import grpc

from codegraft.access.v1 import access_pb2 as pb
from codegraft.access.v1.access_pb2_grpc import AccessServiceServicer
from services.core.auth.caller import current
from services.ingest.keys import DEFAULT_OVERLAP, Keys

Context = grpc.aio.ServicerContext[Any, Any]


class AccessServicer(AccessServiceServicer):
    """See the proto for what every call does and which errors it has."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    async def CreateKey(self, request: pb.CreateKeyRequest, context: Context) -> pb.CreateKeyResponse:
        key, secret = await self._keys.create(current(), request.key_id, request.key, request.request_id)
        return pb.CreateKeyResponse(key=key, secret=secret)

    async def ListKeys(self, request: pb.ListKeysRequest, context: Context) -> pb.ListKeysResponse:
        found, token = await self._keys.page(current(), request.page_size, request.page_token)
        return pb.ListKeysResponse(keys=found, next_page_token=token)

    async def RotateKey(self, request: pb.RotateKeyRequest, context: Context) -> pb.RotateKeyResponse:
        overlap = request.overlap.ToTimedelta() if request.HasField("overlap") else DEFAULT_OVERLAP
        key, secret = await self._keys.rotate(current(), request.name, overlap)
        return pb.RotateKeyResponse(key=key, secret=secret)

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Context) -> pb.RevokeKeyResponse:
        return pb.RevokeKeyResponse(key=await self._keys.revoke(current(), request.name))

    async def GetCaller(self, request: pb.GetCallerRequest, context: Context) -> pb.GetCallerResponse:
        caller = current()
        response = pb.GetCallerResponse(
            subject=caller.subject,
            role=pb.Role.Name(caller.role),
            projects=sorted(caller.projects or ()),
            all_projects=caller.projects is None,
        )
        if caller.expires is not None:
            response.expire_time.FromNanoseconds(round(caller.expires * 1e9))
        return response
