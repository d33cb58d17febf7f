"""OIDC tokens of the company's own identity provider, in place of API keys for people and machines that it knows."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Iterable, Mapping
from typing import Any

import jwt

from services.core import log, names
from services.core.auth.caller import Caller, Role
from services.core.config import CoreSettings
from services.core.errors import InvalidName, InvalidToken, Unavailable

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Asymmetric ones only: with HS256 anybody could sign who can read the public key, and "none" needs no key."""
LEEWAY = 30
"""Seconds by which clocks may differ."""
_KEYS_KEPT = 300
"""Seconds after which the issuer's keys are read again: a key that it withdrew counts so long at most."""
_REFRESH = 10.0
"""Least seconds between two readings of the issuer's keys for the sake of a key id that is not known: whoever invents
them must not make us hammer the issuer."""
_TIMEOUT = 5.0
LONGEST_SUBJECT = 255
"""Characters, as OpenID Connect has it: it becomes part of keys and logs."""
_LONGEST = 16 << 10
"""Characters of a token."""

logger = log.get(__name__)


class Issuer:
    """The public keys of one issuer, fetched when they are needed."""

    def __init__(self, issuer: str, jwks_url: str) -> None:
        self.name = issuer
        self._url = jwks_url
        self._keys: dict[str, jwt.PyJWK] = {}
        self._read = -float(_KEYS_KEPT)
        self._lock = asyncio.Lock()

    async def key(self, id: str) -> jwt.PyJWK:
        """The key of that id.

        Raises:
            InvalidToken: the issuer has no such key.
            Unavailable: it does not answer, and its keys were never read.
        """
        if time.monotonic() - self._read > _KEYS_KEPT or (id not in self._keys and self._may_refresh()):
            async with self._lock:
                if self._may_refresh():
                    await self._refresh()
        if not self._keys:
            raise Unavailable("the tokens' issuer does not answer", retry_after=1.0)
        try:
            return self._keys[id]
        except KeyError:
            raise _invalid("it is signed with a key that its issuer does not have") from None

    def _may_refresh(self) -> bool:
        return time.monotonic() - self._read > _REFRESH

    async def _refresh(self) -> None:
        try:
            found = await asyncio.to_thread(self._fetch)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, jwt.PyJWTError) as error:
            # The keys that are known go on counting: the issuer's outage is none of ours.
            logger.warning("the issuer's keys cannot be read", issuer=self.name, error=str(error))
        else:
            self._keys = found
        self._read = time.monotonic()

    def _fetch(self) -> dict[str, jwt.PyJWK]:
        url = self._url
        if not url:
            described = _get_json(self.name.rstrip("/") + "/.well-known/openid-configuration")
            if described["issuer"] != self.name:
                raise ValueError(f"it calls itself {described['issuer']!r}")
            url = str(described["jwks_uri"])
        found = {}
        for each in _get_json(url)["keys"]:
            try:
                key = jwt.PyJWK.from_dict(each)
            except jwt.PyJWTError:
                continue  # a kind that is not known here, beside others that are
            if key.key_id and key.algorithm_name in ALGORITHMS and each.get("use", "sig") == "sig":
                found[key.key_id] = key
        return found


class Tokens:
    """Makes callers of tokens. Make it with :meth:`of`."""

    def __init__(self, issuer: Issuer, settings: CoreSettings) -> None:
        self._issuer = issuer
        self._settings = settings

    @classmethod
    def of(cls, settings: CoreSettings) -> Tokens | None:
        """None where no issuer is set."""
        if not settings.auth_issuer:
            return None
        return cls(Issuer(settings.auth_issuer, settings.auth_jwks_url), settings)

    async def caller(self, token: str) -> Caller:
        """Who comes with this token.

        Raises:
            InvalidToken: it is not valid here, or gives no role.
            Unavailable: its issuer's keys cannot be read.
        """
        try:
            if len(token) > _LONGEST:
                raise _invalid("it is too long")
            key = await self._issuer.key(str(jwt.get_unverified_header(token).get("kid", "")))
            claims = jwt.decode(
                token,
                key,
                algorithms=ALGORITHMS,
                audience=self._settings.auth_audience,
                issuer=self._issuer.name,
                leeway=LEEWAY,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.PyJWTError as error:
            raise _invalid(str(error)) from None
        if len(claims["sub"]) > LONGEST_SUBJECT:
            raise _invalid("its subject is too long")
        return Caller(
            subject=f"{self._issuer.name}#{claims['sub']}",
            role=self._role(claims),
            projects=self._projects(claims),
            expires=float(claims["exp"]) + LEEWAY,
        )

    def _role(self, claims: Mapping[str, Any]) -> Role:
        """The highest role that the claim's values mean."""
        claim, meanings = self._settings.auth_role_claim, self._settings.auth_roles
        meant = (meanings.get(value, "") if meanings else value for value in _words(claims, claim))
        roles = [Role[word.upper()] for word in meant if word.upper() in Role.__members__]
        if not roles:
            raise _invalid(f"its claim {claim} gives no role")
        return max(roles)

    def _projects(self, claims: Mapping[str, Any]) -> frozenset[str] | None:
        found = set()
        for id in _words(claims, self._settings.auth_projects_claim):
            if id == "*":
                return None
            try:
                found.add(names.build(names.PROJECT, project=id))
            except InvalidName:
                continue  # of another system: no project has such a name
        return frozenset(found)


def _words(claims: Mapping[str, Any], path: str) -> Iterable[str]:
    """The words at a claim: a string's, separated by blanks, or a list's."""
    value: Any = claims.get(path)
    if value is None:
        value = claims
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, str):
        return value.split()
    return [word for word in value if isinstance(word, str)] if isinstance(value, list) else []


def _get_json(url: str) -> Any:
    """What the URL gives. Blocks; for a thread."""
    _check_url(url)
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
        _check_url(response.geturl())  # where redirections led to
        return json.loads(response.read(1 << 20))


def _check_url(url: str) -> None:
    if not url.startswith(("https://", "http://127.0.0.1:", "http://localhost:")):
        raise ValueError(f"{url} is not https: whoever can change its answer could let anybody in")


def _invalid(why: str) -> InvalidToken:
    return InvalidToken(f"the token is not valid here: {why}", hint="Log in again, or ask who manages the tokens.")
