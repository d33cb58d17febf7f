"""API keys: how they are made, rotated and revoked. Ingest keeps them; every service follows (services/core/auth)."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from datetime import timedelta

from pydantic import BaseModel, SecretStr, field_validator

from codegraft.access.v1.access_pb2 import Key, KeySecret, StoredKey
from codegraft.access.v1.access_pb2 import Role as PbRole
from services.core import log, names
from services.core.audit import record as audit
from services.core.auth.caller import Caller, Role
from services.core.auth.keyring import SETTINGS
from services.core.auth.keys import ApiKey, is_id
from services.core.errors import (
    InvalidArgument,
    InvalidName,
    KeyNotFound,
    KeyRevoked,
    PermissionDenied,
    RequestIdReused,
    ResourceExists,
)
from services.core.state import StateStore, Table

DEFAULT_OVERLAP = timedelta(days=1)
LONGEST_OVERLAP = timedelta(days=90)
MOST_PROJECTS = 1000
"""Projects of one key: every service holds them in memory."""

logger = log.get(__name__)


class Seed(BaseModel, frozen=True, extra="forbid"):
    """A key that the settings give, so that there is one to make the others with, and one for each service."""

    key: SecretStr
    """cg_{id}_{secret}"""
    role: str
    """reader, completer, contributor or operator; in all projects. A key that is no operator's is taken for a
    service's, to which no quota applies."""

    @field_validator("key")
    @classmethod
    def _key(cls, value: SecretStr) -> SecretStr:
        if ApiKey.parse(value.get_secret_value()) is None:
            raise ValueError("must be cg_ID_SECRET with 43 or more letters and digits of secret")
        return value

    @field_validator("role")
    @classmethod
    def _role(cls, value: str) -> str:
        if value.upper() not in Role.__members__:
            raise ValueError("must be reader, completer, contributor or operator")
        return value.lower()


class Keys:
    """Every API key.

    Args:
        state: the bucket services.core.auth.keyring.BUCKET.
    """

    def __init__(self, state: StateStore) -> None:
        self._table = Table(state, StoredKey, missing=KeyNotFound)

    async def create(self, caller: Caller, id: str, asked: Key, request_id: str) -> tuple[Key, str]:
        """A new key and its secret.

        Raises:
            InvalidName, InvalidArgument: an id or a value that cannot be.
            PermissionDenied: the caller may not do itself what the key should.
            ResourceExists, RequestIdReused: there is a key of that id.
        """
        id = id or names.new_id("k", request_id=request_id, scope=caller.subject)
        if not is_id(id):
            raise InvalidName(
                f"key_id {id[:80]!r} is not a valid id",
                field="key_id",
                hint="Use 1 to 32 lower-case letters, digits and inner hyphens.",
            )
        audit.about(names.build(names.KEY, key=id), asked.projects)
        _check(caller, asked)
        secret = ApiKey.new(id)
        key = Key(
            name=secret.name,
            title=asked.title,
            role=asked.role,
            projects=sorted(set(asked.projects)),
            all_projects=asked.all_projects,
            creator=caller.subject,
            request_id=request_id,
        )
        if asked.HasField("expire_time"):
            key.expire_time.CopyFrom(asked.expire_time)
        key.create_time.GetCurrentTime()
        stored = StoredKey(name=key.name, key=key)
        stored.secrets.add(sha256=secret.digest)
        try:
            return shown(await self._table.create(stored)), secret.text
        except ResourceExists:
            return shown(await self._again(stored)), secret.text

    async def _again(self, wanted: StoredKey) -> StoredKey:
        """The same call once more: nobody has the first one's secret, or else its owner would not ask again."""

        def change(there: StoredKey) -> None:
            if not wanted.key.request_id or there.key.request_id != wanted.key.request_id:
                raise ResourceExists(f"{there.name} exists already", field="key_id", hint="Choose another id.")
            if _choices(there.key) != _choices(wanted.key) or there.key.HasField("revoke_time"):
                raise RequestIdReused(
                    f"request_id {wanted.key.request_id!r} came before with another request",
                    field="request_id",
                    hint="Use a new request_id for a new request.",
                )
            del there.secrets[:]
            there.secrets.extend(wanted.secrets)

        return await self._table.mutate(wanted.name, change)

    async def get(self, name: str, field: str = "name") -> Key:
        """The key of that name, for ingest itself.

        Raises:
            InvalidName, KeyNotFound.
        """
        names.parse(names.KEY, name, field=field)
        return shown(await self._table.get(name))

    async def page(self, caller: Caller, page_size: int, page_token: str) -> tuple[list[Key], str]:
        """A page of the keys whose projects are all the caller's.

        Raises:
            InvalidPageSize, InvalidPageToken.
        """
        found, token = await self._table.page(
            "", page_size, page_token, where=lambda stored: caller.covers(_projects(stored.key))
        )
        return [shown(stored) for stored in found], token

    async def rotate(self, caller: Caller, name: str, overlap: timedelta) -> tuple[Key, str]:
        """The key with a new secret, and that.

        Raises:
            InvalidName, InvalidArgument: the name or the overlap cannot be.
            KeyNotFound, KeyRevoked, PermissionDenied.
        """
        _check_name(name)
        if not timedelta() <= overlap <= LONGEST_OVERLAP:
            raise InvalidArgument(
                f"overlap is {overlap.total_seconds():g} s", field="overlap", hint="Use 0 seconds to 90 days."
            )
        secret = ApiKey.new(name.removeprefix("keys/"))
        now = time.time_ns()
        ends = now + round(overlap.total_seconds() * 1e9)

        def change(there: StoredKey) -> None:
            audit.about(name, there.key.projects)
            _check_owner(caller, there.key)
            if there.key.HasField("revoke_time"):
                raise KeyRevoked(f"{name} was revoked", field="name", hint="Make another key.")
            old = [copy.deepcopy(each) for each in there.secrets if overlap and _ends(each) > now]
            for each in old:
                each.expire_time.FromNanoseconds(int(min(_ends(each), ends)))
            del there.secrets[:]
            there.secrets.add(sha256=secret.digest)
            there.secrets.extend(old)
            there.key.rotate_time.FromNanoseconds(now)

        return shown(await self._table.mutate(name, change)), secret.text

    async def revoke(self, caller: Caller, name: str) -> Key:
        """The key, revoked.

        Raises:
            InvalidName, KeyNotFound, PermissionDenied.
        """
        _check_name(name)

        def change(there: StoredKey) -> None:
            audit.about(name, there.key.projects)
            _check_owner(caller, there.key)
            if not there.key.HasField("revoke_time"):
                there.key.revoke_time.GetCurrentTime()

        return shown(await self._table.mutate(name, change))

    async def seed(self, seeds: Sequence[Seed]) -> None:
        """Makes the keys that the settings give, where they are not there yet; a revoked one stays revoked.

        Settings with another secret for the same id replace the stored one: who can change the settings is trusted
        with that.
        """
        for seed in seeds:
            key = ApiKey.parse(seed.key.get_secret_value())
            if key is None:  # the settings have been checked
                continue
            wanted = StoredKey(name=key.name)
            wanted.key.name, wanted.key.creator, wanted.key.all_projects = key.name, SETTINGS, True
            wanted.key.role = PbRole.Value(f"ROLE_{seed.role.upper()}")  # type: ignore[assignment]
            wanted.key.create_time.GetCurrentTime()
            wanted.secrets.add(sha256=key.digest)
            try:
                await self._table.create(wanted)
                logger.info("made the key that the settings give", key=key.name, role=seed.role)
            except ResourceExists:
                await self._table.mutate(key.name, lambda there, wanted=wanted: _reseed(there, wanted))  # type: ignore[misc]
        if not seeds and not await self._table.all():
            logger.warning("there is no API key yet: set CODEGRAFT_INGEST_SEED_KEYS")


def _reseed(there: StoredKey, wanted: StoredKey) -> None:
    if there.key.creator != SETTINGS:
        logger.error("the settings give a key whose id belongs to another one", key=there.name)
        return
    there.key.role = wanted.key.role
    if wanted.secrets[0].sha256 not in {each.sha256 for each in there.secrets}:
        del there.secrets[:]
        there.secrets.extend(wanted.secrets)
        there.key.rotate_time.GetCurrentTime()


def shown(stored: StoredKey) -> Key:
    """What callers see of it."""
    key = Key()
    key.CopyFrom(stored.key)
    key.etag = stored.etag
    return key


def _check(caller: Caller, asked: Key) -> None:
    if int(asked.role) not in set(Role):
        raise InvalidArgument(
            "the key has no role", field="key.role", hint="Give READER, COMPLETER, CONTRIBUTOR or OPERATOR."
        )
    if bool(asked.projects) == asked.all_projects:
        raise InvalidArgument(
            "a key is for some projects or for all", field="key.projects", hint="Give projects, or all_projects."
        )
    if len(asked.projects) > MOST_PROJECTS:
        raise InvalidArgument(
            f"{len(asked.projects)} projects are too many for one key",
            field="key.projects",
            hint=f"Give at most {MOST_PROJECTS}, or all_projects.",
        )
    for name in asked.projects:
        names.parse(names.PROJECT, name, field="key.projects")
    if len(asked.title) > 200:
        raise InvalidArgument("the title is too long", field="key.title", hint="Use at most 200 characters.")
    if asked.HasField("expire_time") and asked.expire_time.ToNanoseconds() <= time.time_ns():
        raise InvalidArgument("the key would have ended already", field="key.expire_time", hint="Give a later time.")
    _check_owner(caller, asked)


def covers(caller: Caller, key: Key) -> bool:
    """Whether the caller may do itself what the key may."""
    return caller.covers(_projects(key)) and caller.role >= key.role


def _check_owner(caller: Caller, key: Key) -> None:
    """A caller of some projects has no say over keys that reach farther."""
    if not covers(caller, key):
        raise PermissionDenied(
            f"{caller.subject} may not do itself what {key.name or 'the key'} may",
            field="key.projects",
            hint="Use a key of all those projects.",
        )


def _check_name(name: str) -> None:
    names.parse(names.KEY, name)


def _projects(key: Key) -> frozenset[str] | None:
    # One that has no project left, because they were deleted, is for those to see who see all keys.
    return None if key.all_projects or not key.projects else frozenset(key.projects)


def _choices(key: Key) -> tuple[object, ...]:
    """What the caller chose."""
    expires = key.expire_time.ToNanoseconds() if key.HasField("expire_time") else None
    return key.title, key.role, list(key.projects), key.all_projects, expires


def _ends(secret: KeySecret) -> float:
    """Nanoseconds since 1970."""
    return secret.expire_time.ToNanoseconds() if secret.HasField("expire_time") else math.inf
