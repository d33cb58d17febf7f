"""Quotas as operators set them. Ingest keeps them beside the keys; every service follows (services/core/quota)."""

from __future__ import annotations

from codegraft.access.v1.quota_pb2 import Limits, Quota
from services.core import names
from services.core.audit import record as audit
from services.core.auth.caller import Caller, Role
from services.core.errors import InvalidArgument, PermissionDenied, ResourceExists
from services.core.quota.limits import UNLIMITED, effective, message_of, of_message
from services.core.quota.quotas import Quotas, table
from services.core.state import StateStore
from services.ingest.keys import Keys, covers
from services.ingest.records import Tables


class QuotaDesk:
    """What projects and keys may use.

    Args:
        state: the bucket services.core.auth.keyring.BUCKET.
    """

    def __init__(self, state: StateStore, tables: Tables, keys: Keys, quotas: Quotas) -> None:
        self._table = table(state)
        self._tables, self._keys, self._quotas = tables, keys, quotas

    async def get(self, caller: Caller, name: str) -> tuple[Quota, Limits]:
        """What was set for a project or key, and what counts.

        Raises:
            InvalidName, ProjectNotFound, KeyNotFound, PermissionDenied.
        """
        owner = await self.readable(caller, name)
        return self._told(owner, await self._table.find(name) or Quota(name=name))

    async def set(self, caller: Caller, asked: Quota) -> tuple[Quota, Limits]:
        """The quota as stored, and what counts.

        Raises:
            InvalidName, InvalidArgument, ProjectNotFound, KeyNotFound, PermissionDenied, EtagMismatch.
        """
        owner = _owner(asked.name, "quota.name")
        if owner.startswith("projects/"):
            audit.about(asked.name, [owner])
            if caller.projects is not None:  # or each project would lift its own
                raise PermissionDenied(
                    f"{caller.subject} is not of all projects",
                    field="quota.name",
                    hint="The quota of a project is set by operators of all projects.",
                )
            await self._tables.known(owner, "quota.name")
        else:
            key = await self._keys.get(owner, "quota.name")
            audit.about(asked.name, key.projects)
            if not covers(caller, key):
                raise PermissionDenied(
                    f"{caller.subject} is not of all projects of {owner}",
                    field="quota.name",
                    hint="The quota of a key is set by operators of all its projects.",
                )
        for kind, value in of_message(asked.limits).items():
            if value < UNLIMITED:
                raise InvalidArgument(
                    f"{kind} is {value}",
                    field=f"quota.limits.{kind}",
                    hint="Give 0 or more, -1 for no limit, or leave it out for the default.",
                )

        def change(there: Quota) -> None:
            there.limits.CopyFrom(asked.limits)
            there.update_time.GetCurrentTime()
            there.updater = caller.subject

        wanted = Quota(name=asked.name)
        change(wanted)
        if not asked.etag:
            try:
                return self._told(owner, await self._table.create(wanted))
            except ResourceExists:
                pass
        return self._told(owner, await self._table.mutate(asked.name, change, etag=asked.etag))

    async def readable(self, caller: Caller, name: str, field: str = "name") -> str:
        """The project or key whose quota that is, when the caller may see it.

        Raises:
            InvalidName, ProjectNotFound, KeyNotFound, PermissionDenied.
        """
        owner = _owner(name, field)
        if owner == caller.subject:
            return owner
        if owner.startswith("projects/"):
            if caller.covers(frozenset({owner})):
                await self._tables.known(owner, field)
                return owner
        elif caller.role >= Role.OPERATOR and covers(caller, await self._keys.get(owner, field)):
            return owner
        raise PermissionDenied(
            f"{caller.subject} may not see {name}",
            field=field,
            hint="Ask for your own key's, for those of your projects, or as an operator.",
        )

    def _told(self, owner: str, quota: Quota) -> tuple[Quota, Limits]:
        # Of the record itself: this process hears of its own writes a moment later.
        counts = effective(of_message(quota.limits), self._quotas.defaults(owner))
        return quota, message_of(counts)


def _owner(name: str, field: str) -> str:
    """The project or key. Raises InvalidName."""
    names.parse(names.KEY_QUOTA if name.startswith("keys/") else names.PROJECT_QUOTA, name, field=field)
    return name.removesuffix("/quota")
