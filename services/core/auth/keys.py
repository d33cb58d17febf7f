"""API keys: ``cg_{id}_{secret}``. The id finds the key, the secret proves it; of the secret only a hash is stored.

A plain SHA-256 is enough for that: the secret is 256 random bits and no password that could be guessed, so that slow
hashes and salts would protect nothing, and cost milliseconds in every call.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass, field

PREFIX = "cg_"
"""What tells an API key from a token, and lets scanners for leaked secrets find one."""
_FORM = re.compile(r"cg_([a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?)_([A-Za-z0-9_-]{43,128})")
"""43 characters of base64url hold 256 bits."""
_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key in its parts."""

    id: str
    secret: str = field(repr=False)

    @classmethod
    def new(cls, id: str) -> ApiKey:
        """One with a fresh secret."""
        return cls(id, secrets.token_urlsafe(32))

    @classmethod
    def parse(cls, text: str) -> ApiKey | None:
        """The key that the text spells; None when it has not the form of one."""
        match = _FORM.fullmatch(text)
        return cls(match[1], match[2]) if match else None

    @property
    def text(self) -> str:
        """What its user sends."""
        return f"{PREFIX}{self.id}_{self.secret}"

    @property
    def name(self) -> str:
        """Its resource name."""
        return f"keys/{self.id}"

    @property
    def digest(self) -> bytes:
        """What is stored of the secret: its SHA-256."""
        return hashlib.sha256(self.secret.encode()).digest()


def is_id(text: str) -> bool:
    """Whether the text can be a key's id: 1 to 32 of a-z, 0-9 and inner hyphens."""
    return _ID.fullmatch(text) is not None
