"""Who is signed in: an API key in a cookie that only the gateway can open.

Nothing is kept here: the cookie is the session. It ends with the browser, after :data:`HOURS`, or with the key.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from dataclasses import dataclass, field

from cryptography.fernet import Fernet, InvalidToken
from starlette.requests import Request
from starlette.responses import Response

COOKIE = "codegraft-console"
PATH = "/console"
"""Where browsers send it: not to what editors use."""
LOGIN_COOKIE = "codegraft-login"
LOGIN_PATH = f"{PATH}/login"
"""The form to sign in has a token of its own: whoever comes by a link from elsewhere gets there though he is signed in
(browsers keep a strict cookie to themselves then), and must not lose his session."""
HOURS = 12
"""After which one signs in again."""
LONGEST_KEY = 2400
"""Characters: a cookie of more than 4,096, which it would be sealed, is dropped by browsers."""
_SEPARATOR = "\n"
"""No key has one."""


@dataclass(frozen=True, slots=True)
class Session:
    """What the cookie holds."""

    key: str = field(default="", repr=False)
    """API key or OIDC token; empty before one signed in, when it goes into a cookie of its own."""
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    """What forms of this session carry."""

    def owns(self, token: str) -> bool:
        """Whether a form with this token is one of this session's."""
        return hmac.compare_digest(token.encode(), self.csrf.encode())


class Vault:
    """Seals sessions into cookies.

    Args:
        key: any text with enough entropy; empty takes a random one, with which nobody else can open them, and a restart
            signs everybody out.
    """

    def __init__(self, key: str) -> None:
        secret = hashlib.sha256(key.encode()).digest() if key else secrets.token_bytes(32)
        self._fernet = Fernet(base64.urlsafe_b64encode(secret))

    def read(self, request: Request, cookie: str = COOKIE) -> Session | None:
        """The request's session; None without one, or when it is over, forged or sealed with another key."""
        try:
            opened = self._fernet.decrypt(request.cookies.get(cookie, "").encode(), ttl=HOURS * 3600).decode()
        except (InvalidToken, UnicodeError):
            return None
        csrf, _, key = opened.partition(_SEPARATOR)
        return Session(key, csrf)

    def write(self, response: Response, session: Session, *, secure: bool) -> None:
        """Gives the session to the browser: to no script, with no request from another site, and over https only where
        it was https."""
        sealed = self._fernet.encrypt(f"{session.csrf}{_SEPARATOR}{session.key}".encode()).decode()
        cookie, path = (COOKIE, PATH) if session.key else (LOGIN_COOKIE, LOGIN_PATH)
        response.set_cookie(cookie, sealed, path=path, secure=secure, httponly=True, samesite="strict")


def end(response: Response) -> None:
    """Takes the session from the browser."""
    response.delete_cookie(COOKIE, path=PATH, httponly=True, samesite="strict")


def is_https(request: Request) -> bool:
    """Whether the browser speaks https, to the proxy before us or to us."""
    origin = request.headers.get("origin", "")  # browsers send it with every form
    proxied = request.headers.get("x-forwarded-proto", "").partition(",")[0].strip()
    return "https" in (origin.partition(":")[0].lower(), proxied.lower(), request.url.scheme)
