"""A file behind an https URL, downloaded with bounds, and never from an address inside the house.

The address is looked up once, checked, and connected to as it is: a name that resolves to something else a moment later
(DNS rebinding) gains nothing. Every redirect is checked in the same way.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import SplitResult, urljoin, urlsplit

from services.core.errors import InvalidArgument, SourceUnreachable, UploadMismatch
from services.ingest.limits import Limits, Meter

_TIMEOUT = 30.0
"""Seconds for connecting and for each read."""
_REDIRECTS = 5
_CHUNK = 1 << 20


def check_url(url: str, allowed: Sequence[str] = ()) -> SplitResult:
    """Accepts https URLs without credentials, and what begins with an allowed prefix.

    Raises:
        InvalidArgument: anything else.
    """
    hint = "Give https://host/path, without a password in it."
    if not url.isprintable() or " " in url or len(url) > 2000:
        raise InvalidArgument("the URL has characters that no URL has", field="url.url", hint=hint)
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise InvalidArgument(f"{url[:200]!r} is no URL", field="url.url", hint=hint) from None
    trusted = any(url.startswith(prefix) for prefix in allowed)
    if parts.scheme != "https" and not (trusted and parts.scheme == "http"):
        raise InvalidArgument(f"only https URLs are fetched, not {url[:200]!r}", field="url.url", hint=hint)
    if parts.username or parts.password or not parts.hostname:
        raise InvalidArgument("the URL has credentials in it, or no host", field="url.url", hint=hint)
    return parts


def download(url: str, sha256: str, to: Path, limits: Limits, allowed: Sequence[str] = ()) -> None:
    """Writes what the URL gives to a file.

    Args:
        sha256: digest it must have; empty when unknown.
        allowed: URL prefixes that may be http or lead to a private address.

    Raises:
        InvalidArgument: the URL, or one it redirects to, is refused.
        SourceUnreachable: the server cannot be reached or does not give it.
        LimitExceeded: it is too large or takes too long.
        UploadMismatch: it has another digest.
    """
    meter = Meter(limits)
    for _ in range(_REDIRECTS + 1):
        parts = check_url(url, allowed)
        try:
            location = _get(parts, url, to, meter, allowed)
        except (OSError, http.client.HTTPException) as error:
            raise SourceUnreachable(f"{url} cannot be fetched: {error}", hint="Check the URL.") from None
        if location is None:
            break
        url = urljoin(url, location)
    else:
        raise SourceUnreachable(f"{url} redirects too often", hint="Give the URL it leads to.")
    if sha256:
        with to.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise UploadMismatch(f"{url} has the SHA-256 {found}, not {sha256}", field="url.sha256", hint="Check both.")


def _get(parts: SplitResult, url: str, to: Path, meter: Meter, allowed: Sequence[str]) -> str | None:
    """Downloads, or returns where the server redirects to."""
    assert parts.hostname
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = _resolve(parts.hostname, port, trusted=any(url.startswith(prefix) for prefix in allowed))
    plain = socket.create_connection((address, port), timeout=_TIMEOUT)
    connection = http.client.HTTPConnection(parts.hostname, port, timeout=_TIMEOUT)
    try:
        connection.sock = (
            ssl.create_default_context().wrap_socket(plain, server_hostname=parts.hostname)
            if parts.scheme == "https"
            else plain
        )
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"User-Agent": "codegraft", "Accept-Encoding": "identity"})
        response = connection.getresponse()
        location = response.getheader("Location")
        if response.status in (301, 302, 303, 307, 308) and location:
            return location
        if response.status != 200:
            raise SourceUnreachable(f"{url} answers {response.status} {response.reason}", hint="Check the URL.")
        with to.open("wb") as file:
            while data := response.read(_CHUNK):
                meter.count_bytes(len(data))
                file.write(data)
        return None
    finally:
        connection.close()
        plain.close()


def _resolve(host: str, port: int, *, trusted: bool) -> str:
    """The address to connect to.

    Raises:
        InvalidArgument: any of the host's addresses is not a public one, and the URL is not allowed by the settings.
    """
    found = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    if not trusted and any(not ipaddress.ip_address(address.split("%")[0]).is_global for address in found):
        raise InvalidArgument(
            f"{host} is not on the public internet",
            field="url.url",
            hint="Upload the file, or let an operator allow the URL in CODEGRAFT_INGEST_ALLOWED_URLS.",
        )
    return sorted(found)[0]
