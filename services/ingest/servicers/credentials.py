"""CredentialService."""

from __future__ import annotations

from typing import Any

import grpc

from codegraft.ingest.v1 import credential_pb2 as pb
from codegraft.ingest.v1.credential_pb2_grpc import CredentialServiceServicer
from services.core import names
from services.core.errors import CredentialInUse, InvalidCredential, RequestIdReused, ResourceExists
from services.ingest.credentials import Vault, check_known_hosts, take
from services.ingest.records import Tables

Context = grpc.aio.ServicerContext[Any, Any]


class CredentialServicer(CredentialServiceServicer):
    """See the proto for what every call does and which errors it has."""

    def __init__(self, tables: Tables, vault: Vault) -> None:
        self._tables = tables
        self._vault = vault

    async def CreateCredential(
        self, request: pb.CreateCredentialRequest, context: Context
    ) -> pb.CreateCredentialResponse:
        await self._tables.known(request.parent)
        chosen = request.credential_id or names.new_id("c", request_id=request.request_id, scope=request.parent)
        names.check_id(chosen, "credential_id")
        wanted = pb.Credential(
            name=f"{request.parent}/credentials/{chosen}",
            title=request.credential.title,
            known_hosts=check_known_hosts(request.credential.known_hosts),
            pin_on_first_use=request.credential.pin_on_first_use,
            request_id=request.request_id,
        )
        sealed = self._vault.seal(wanted.name, take(request.secret, wanted))
        wanted.create_time.GetCurrentTime()
        wanted.update_time.CopyFrom(wanted.create_time)
        stored = pb.StoredCredential(name=wanted.name, credential=wanted, sealed=sealed)
        try:
            return pb.CreateCredentialResponse(credential=shown(await self._tables.credentials.create(stored)))
        except ResourceExists:
            there = shown(await self._tables.credentials.get(wanted.name))
            if not request.request_id or there.request_id != request.request_id:
                raise ResourceExists(
                    f"{wanted.name} exists already", field="credential_id", hint="Choose another id, or update it."
                ) from None
            if there.kind != wanted.kind or there.title != wanted.title:
                raise RequestIdReused(
                    f"request_id {request.request_id!r} came before with another request",
                    field="request_id",
                    hint="Use a new request_id for a new request.",
                ) from None
            return pb.CreateCredentialResponse(credential=there)

    async def GetCredential(self, request: pb.GetCredentialRequest, context: Context) -> pb.GetCredentialResponse:
        names.parse(names.CREDENTIAL, request.name)
        return pb.GetCredentialResponse(credential=shown(await self._tables.credentials.get(request.name)))

    async def ListCredentials(self, request: pb.ListCredentialsRequest, context: Context) -> pb.ListCredentialsResponse:
        await self._tables.known(request.parent)
        found, token = await self._tables.credentials.page(request.parent, request.page_size, request.page_token)
        return pb.ListCredentialsResponse(credentials=map(shown, found), next_page_token=token)

    async def UpdateCredential(
        self, request: pb.UpdateCredentialRequest, context: Context
    ) -> pb.UpdateCredentialResponse:
        asked = request.credential
        names.parse(names.CREDENTIAL, asked.name, field="credential.name")
        known_hosts = check_known_hosts(asked.known_hosts)
        told = pb.Credential(name=asked.name)
        sealed = b""
        if request.HasField("secret"):
            sealed = self._vault.seal(asked.name, take(request.secret, told))

        def change(record: pb.StoredCredential) -> None:
            kept = record.credential
            if sealed:
                if told.kind != kept.kind:
                    raise InvalidCredential(
                        "the new secret is of another kind", field="secret.kind", hint="Make a credential of its own."
                    )
                kept.username, kept.public_key, kept.fingerprint = told.username, told.public_key, told.fingerprint
                record.sealed = sealed
            kept.title = asked.title
            kept.known_hosts[:] = known_hosts
            kept.pin_on_first_use = asked.pin_on_first_use
            kept.update_time.GetCurrentTime()

        stored = await self._tables.credentials.mutate(asked.name, change, etag=asked.etag)
        return pb.UpdateCredentialResponse(credential=shown(stored))

    async def DeleteCredential(
        self, request: pb.DeleteCredentialRequest, context: Context
    ) -> pb.DeleteCredentialResponse:
        names.parse(names.CREDENTIAL, request.name)
        sources = await self._tables.sources.all(names.project_of(request.name) + "/sources/")
        users = [source.name for source in sources if source.git.credential == request.name]
        if users:
            raise CredentialInUse(
                f"{request.name} is used by {users[0]}" + (f" and {len(users) - 1} more" if users[1:] else ""),
                field="name",
                hint="Give those sources another credential first.",
            )
        await self._tables.credentials.delete(request.name, etag=request.etag)
        return pb.DeleteCredentialResponse()


def shown(stored: pb.StoredCredential) -> pb.Credential:
    """What callers see of it."""
    credential = pb.Credential()
    credential.CopyFrom(stored.credential)
    credential.etag = stored.etag
    return credential
