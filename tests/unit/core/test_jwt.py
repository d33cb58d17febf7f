"""OIDC tokens: whose are taken, what they give, and what happens when their issuer is away."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from services.core.auth import jwt as tokens
from services.core.auth.caller import Role
from services.core.auth.gate import Gate
from services.core.auth.jwt import Tokens
from services.core.auth.keyring import Keyring
from services.core.config import CoreSettings
from services.core.errors import InvalidToken, Unauthenticated, Unavailable
from services.core.state import MemoryState

RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())


class Provider:
    """An identity provider on loopback."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {"rsa": RSA, "ec": EC}
        self.documents: dict[str, Any] = {}
        self.asked: list[str] = []
        self.down = False
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.asked.append(self.path)
                answer = None if provider.down else provider.answer(self.path)
                self.send_response(200 if answer is not None else 503)
                self.end_headers()
                self.wfile.write(json.dumps(answer or {}).encode())

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.issuer = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path: str) -> Any:
        if path == "/.well-known/openid-configuration":
            return {"issuer": self.issuer, "jwks_uri": f"{self.issuer}/keys"} | self.documents
        algorithms = {"rsa": jwt.algorithms.RSAAlgorithm, "ec": jwt.algorithms.ECAlgorithm}
        listed = [
            {**algorithms[id.split("-")[0]].to_jwk(key.public_key(), as_dict=True), "kid": id, "use": "sig"}
            for id, key in self.keys.items()
        ]
        return {"keys": [*listed, {"kty": "oct", "k": "c2VjcmV0", "kid": "shared"}, {"kty": "new"}]}

    def token(self, id: str = "rsa", *, algorithm: str = "", **claims: Any) -> str:
        given = {
            "iss": self.issuer, "aud": "codegraft", "sub": "ada", "exp": time.time() + 60,
            "codegraft_role": "contributor", "codegraft_projects": ["p", "q"],
        } | claims  # fmt: skip
        payload = {name: value for name, value in given.items() if value is not None}
        algorithm = algorithm or {"rsa": "RS256", "ec": "ES256"}[id.split("-")[0]]
        return jwt.encode(payload, self.keys[id], algorithm, headers={"kid": id})


@pytest.fixture
def provider() -> Iterator[Provider]:
    provider = Provider()
    yield provider
    provider.server.shutdown()
    provider.server.server_close()


def taking(provider: Provider, **settings: Any) -> Tokens:
    made = Tokens.of(CoreSettings(auth_issuer=provider.issuer, **settings))
    assert made is not None
    return made


@pytest.mark.parametrize("id", ["rsa", "ec"])
async def test_a_token_makes_its_caller(provider: Provider, id: str) -> None:
    caller = await taking(provider).caller(provider.token(id))
    assert caller.subject == f"{provider.issuer}#ada"
    assert caller.role is Role.CONTRIBUTOR and caller.projects == {"projects/p", "projects/q"}
    assert caller.expires is not None and 30 < caller.expires - time.time() < 120
    assert provider.asked == ["/.well-known/openid-configuration", "/keys"]


async def test_keys_are_read_once_and_from_where_the_settings_say(provider: Provider) -> None:
    taken = taking(provider, auth_jwks_url=f"{provider.issuer}/keys")
    for _ in range(5):
        await taken.caller(provider.token())
    assert provider.asked == ["/keys"]


def confused(provider: Provider) -> str:
    """Signed with HMAC, whose secret is the issuer's public key that everybody can read; PyJWT would not make it."""
    public = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    _, payload, _ = provider.token().split(".")
    head = base64.urlsafe_b64encode(json.dumps({"alg": "HS256", "typ": "JWT", "kid": "rsa"}).encode()).rstrip(b"=")
    signed = head + b"." + payload.encode()
    mac = hmac.new(public, signed, hashlib.sha256).digest()
    return (signed + b"." + base64.urlsafe_b64encode(mac).rstrip(b"=")).decode()


def unsigned(provider: Provider) -> str:
    _, payload, _ = provider.token().split(".")
    head = base64.urlsafe_b64encode(json.dumps({"alg": "none", "kid": "rsa"}).encode()).rstrip(b"=").decode()
    return f"{head}.{payload}."


def foreign(provider: Provider) -> str:
    provider.keys["rsa"] = rsa.generate_private_key(65537, 2048)
    made = provider.token()
    provider.keys["rsa"] = RSA
    return made


BAD = {
    "signed with another key": foreign,
    "signed with the public key as a secret": confused,
    "not signed": unsigned,
    "of another issuer": lambda p: p.token(iss="https://elsewhere"),
    "for another audience": lambda p: p.token(aud="another"),
    "for no audience": lambda p: p.token(aud=None),
    "expired": lambda p: p.token(exp=time.time() - 60),
    "for ever": lambda p: p.token(exp=None),
    "not valid yet": lambda p: p.token(nbf=time.time() + 600),
    "of somebody with a novel for a name": lambda p: p.token(sub="x" * 256),
    "of nobody": lambda p: p.token(sub=None),
    "without a role": lambda p: p.token(codegraft_role=None),
    "with a role of another system": lambda p: p.token(codegraft_role=["admin", 7, None]),
    "too long": lambda p: p.token(more="x" * (20 << 10)),
    "changed": lambda p: p.token()[:-6] + "AAAAAA",
    "no token": lambda p: "a.b.c",
    "nothing": lambda p: "x",
}


@pytest.mark.parametrize("what", BAD)
async def test_no_other_token_is_taken(provider: Provider, what: str) -> None:
    with pytest.raises(InvalidToken) as refused:
        await taking(provider).caller(BAD[what](provider))
    assert refused.value.hint


async def test_what_the_claims_mean_is_set(provider: Provider) -> None:
    meant = taking(
        provider,
        auth_audience="api://codegraft",
        auth_role_claim="realm.groups",
        auth_roles={"dev": "completer", "ml": "contributor"},
        auth_projects_claim="teams",
    )
    made = provider.token(aud=["x", "api://codegraft"], realm={"groups": ["dev", "ml", "all"]}, teams="p Q/../x r")
    caller = await meant.caller(made)
    assert caller.role is Role.CONTRIBUTOR and caller.projects == {"projects/p", "projects/r"}
    everywhere = await meant.caller(provider.token(aud="api://codegraft", realm={"groups": ["dev"]}, teams=["*"]))
    assert everywhere.role is Role.COMPLETER and everywhere.projects is None
    nowhere = await meant.caller(provider.token(aud="api://codegraft", realm={"groups": ["dev"]}))
    assert nowhere.projects == frozenset()
    with pytest.raises(InvalidToken):  # a role's own name is no group of theirs
        await meant.caller(provider.token(aud="api://codegraft", realm={"groups": ["operator"]}))


async def test_new_keys_are_found_and_invented_ones_do_not_hammer_the_issuer(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = taking(provider)
    await taken.caller(provider.token())
    before = len(provider.asked)
    provider.keys["ec-new"] = ec.generate_private_key(ec.SECP256R1())
    for _ in range(20):
        with pytest.raises(InvalidToken, match="does not have"):
            await taken.caller(provider.token("ec-new"))
    assert len(provider.asked) == before
    monkeypatch.setattr(tokens, "_REFRESH", 0.0)
    assert (await taken.caller(provider.token("ec-new"))).role is Role.CONTRIBUTOR
    assert len(provider.asked) == before + 2


async def test_known_keys_outlive_an_outage_of_the_issuer(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    never, taken = taking(provider), taking(provider)
    await taken.caller(provider.token())
    provider.down = True
    monkeypatch.setattr(tokens, "_KEYS_KEPT", 0)
    monkeypatch.setattr(tokens, "_REFRESH", 0.0)
    assert (await taken.caller(provider.token())).role is Role.CONTRIBUTOR
    for _ in range(3):
        with pytest.raises(Unavailable) as refused:
            await never.caller(provider.token())
        assert refused.value.retry_after


async def test_a_withdrawn_key_counts_no_more(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, made = taking(provider), provider.token()
    await taken.caller(made)
    del provider.keys["rsa"]
    monkeypatch.setattr(tokens, "_KEYS_KEPT", 0)
    monkeypatch.setattr(tokens, "_REFRESH", 0.0)
    with pytest.raises(InvalidToken):
        await taken.caller(made)


@pytest.mark.parametrize("documents", [{"issuer": "https://elsewhere"}, {"jwks_uri": "http://example.org/keys"}])
async def test_a_provider_that_contradicts_itself_is_not_believed(provider: Provider, documents: Any) -> None:
    provider.documents = documents
    with pytest.raises(Unavailable):
        await taking(provider).caller(provider.token())


async def test_the_gate_tells_tokens_from_keys(provider: Provider) -> None:
    method = "/codegraft.ingest.v1.ProjectService/GetProject"
    gate = Gate(Keyring(MemoryState()), taking(provider))
    caller = await gate.identify(method, {"authorization": f"Bearer {provider.token()}"})
    assert caller.subject.endswith("#ada") and gate.why_ended(caller) is None
    without = Gate(Keyring(MemoryState()), Tokens.of(CoreSettings()))
    with pytest.raises(Unauthenticated, match="not known"):
        await without.identify(method, {"authorization": f"Bearer {provider.token()}"})
