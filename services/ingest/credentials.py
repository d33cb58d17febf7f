"""Secrets of private repositories: read, checked, encrypted at rest, and opened only for a fetch."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from codegraft.ingest.v1.credential_pb2 import (
    CREDENTIAL_KIND_HTTPS_TOKEN,
    CREDENTIAL_KIND_SSH_KEY,
    Credential,
    CredentialSecret,
)
from services.core.errors import CredentialsDisabled, InvalidCredential
from services.ingest.sources.git import HttpsToken, Secret, SshKey

MIN_RSA_BITS = 2048
MAX_KNOWN_HOSTS = 1000
_HOSTS = re.compile(r"(\|1\|[A-Za-z0-9+/=]+\|[A-Za-z0-9+/=]+|[A-Za-z0-9.\-:,\[\]*?!_]+)")
_KEY_TYPE = re.compile(r"[a-z0-9@.-]+")


class Vault:
    """Seals and opens secrets with the operator's keys. The first key seals; any of them opens, so that keys can be
    exchanged without a pause: put the new one in front, and drop the old one when everything is sealed anew.

    Args:
        keys: Fernet keys (32 bytes in URL-safe base 64); empty when the service was given none.

    Raises:
        ValueError: one is no such key.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._fernet = MultiFernet([Fernet(key) for key in keys]) if keys else None

    def seal(self, name: str, secret: Secret) -> bytes:
        """Encrypts a secret for the credential of that name.

        Raises:
            CredentialsDisabled: there is no key.
        """
        kept: dict[str, str] = {"name": name}
        match secret:
            case HttpsToken():
                kept |= {"username": secret.username, "token": secret.token}
            case SshKey():
                kept |= {"private_key": secret.private_key}
        return self._keys().encrypt(json.dumps(kept).encode())

    def open(self, credential: Credential, sealed: bytes) -> Secret:
        """Decrypts what was sealed for the credential.

        Raises:
            CredentialsDisabled: there is no key, or it is not the one, or the secret is another credential's.
        """
        try:
            kept: dict[str, Any] = json.loads(self._keys().decrypt(sealed))
        except InvalidToken:
            kept = {}
        if kept.get("name") != credential.name:  # a record that was copied to another name opens nothing
            raise CredentialsDisabled(
                f"{credential.name} cannot be decrypted with the service's keys",
                hint="Give the service the key it was encrypted with (CODEGRAFT_INGEST_CREDENTIAL_KEYS), or set the "
                "secret anew.",
            )
        if "token" in kept:
            return HttpsToken(kept["username"], kept["token"])
        return SshKey(kept["private_key"], tuple(credential.known_hosts), credential.pin_on_first_use)

    def _keys(self) -> MultiFernet:
        if self._fernet is None:
            raise CredentialsDisabled(
                "this service has no key to encrypt credentials with",
                hint="Set CODEGRAFT_INGEST_CREDENTIAL_KEYS to a list with one Fernet key; "
                "`codegraft credential new-key` prints one.",
            )
        return self._fernet


def new_key() -> str:
    """A fresh key for a vault."""
    return Fernet.generate_key().decode()


def take(given: CredentialSecret, credential: Credential) -> Secret:
    """Reads a secret as it came in, and notes in the credential what may be shown of it.

    Raises:
        InvalidCredential: it is missing or cannot be read.
    """
    match given.WhichOneof("kind"):
        case "https_token":
            token, username = given.https_token.token, given.https_token.username or "git"
            if not token or not token.isprintable() or not username.isprintable() or len(token) > 10_000:
                raise InvalidCredential(
                    "the token is empty or has characters that no token has",
                    field="secret.https_token.token",
                    hint="Give it without line ends.",
                )
            credential.kind, credential.username = CREDENTIAL_KIND_HTTPS_TOKEN, username
            return HttpsToken(username, token)
        case "ssh_private_key":
            key = _read_key(given.ssh_private_key.private_key, given.ssh_private_key.passphrase)
        case "generate_ssh_key":
            key = ed25519.Ed25519PrivateKey.generate()
        case _:
            raise InvalidCredential(
                "the credential has no secret",
                field="secret.kind",
                hint="Set one of https_token, ssh_private_key and generate_ssh_key.",
            )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    digest = hashlib.sha256(base64.b64decode(public.split()[1])).digest()
    credential.kind = CREDENTIAL_KIND_SSH_KEY
    credential.public_key = f"{public} codegraft:{credential.name}"
    credential.fingerprint = "SHA256:" + base64.b64encode(digest).decode().rstrip("=")
    return SshKey(private.decode())


_PrivateKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def _read_key(text: str, passphrase: str) -> _PrivateKey:
    field = "secret.ssh_private_key.private_key"
    load = (
        serialization.load_ssh_private_key
        if "BEGIN OPENSSH PRIVATE KEY" in text
        else serialization.load_pem_private_key
    )
    try:
        key = load(text.strip().encode() + b"\n", passphrase.encode() or None)
    except (ValueError, TypeError, UnsupportedAlgorithm, binascii.Error) as error:
        locked = bool(passphrase) or "passw" in str(error).lower()  # a wrong one gives nonsense, which then is no key
        raise InvalidCredential(
            "the private key cannot be opened" if locked else "this is no private key that can be read",
            field="secret.ssh_private_key.passphrase" if locked else field,
            hint="Give its passphrase." if locked else "Give the whole file, for example ~/.ssh/id_ed25519.",
        ) from None
    if not isinstance(key, _PrivateKey):
        raise InvalidCredential("keys of this kind are not used any more", field=field, hint="Make an Ed25519 key.")
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size < MIN_RSA_BITS:
        raise InvalidCredential(
            f"the RSA key has {key.key_size} bits, and at least {MIN_RSA_BITS} are safe",
            field=field,
            hint="Make an Ed25519 key.",
        )
    return key


def check_known_hosts(lines: Sequence[str], field: str = "credential.known_hosts") -> list[str]:
    """The lines that name host keys, without comments, as ssh-keyscan prints them.

    Raises:
        InvalidCredential: a line is none.
    """
    kept = []
    for line in (part.strip() for text in lines for part in text.splitlines()):
        if not line or line.startswith("#"):
            continue
        words = line.removeprefix("@cert-authority ").removeprefix("@revoked ").split()
        if len(words) < 3 or not _HOSTS.fullmatch(words[0]) or not _is_host_key(words[1], words[2]):
            raise InvalidCredential(
                f"{line[:100]!r} is no line of known_hosts", field=field, hint="Give what `ssh-keyscan HOST` prints."
            )
        kept.append(line)
    if len(kept) > MAX_KNOWN_HOSTS:
        raise InvalidCredential(f"more than {MAX_KNOWN_HOSTS} host keys", field=field, hint="Give those of its hosts.")
    return kept


def _is_host_key(kind: str, text: str) -> bool:
    """Whether the key's first field, within the base 64, repeats its kind."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return False
    length = int.from_bytes(data[:4], "big")
    return bool(_KEY_TYPE.fullmatch(kind)) and data[4 : 4 + length] == kind.encode() and len(data) > 4 + length
