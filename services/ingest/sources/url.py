"""A file behind an https URL, downloaded with bounds, and never from an address inside the house.

Every redirect is checked as the first URL is.
"""

from __future__ import annotations

import hashlib
import http.client
import socket
import ssl
import threading
from pathlib import Path
from urllib.parse import SplitResult, urljoin, urlsplit

from services.core.errors import InvalidArgument, SourceUnreachable, UploadMismatch
from services.ingest.limits import Meter
from services.ingest.sources.guard import Guard

_TIMEOUT = 30.0
"""Seconds for connecting and for each read."""
_REDIRECTS = 5
_CHUNK = 1 << 20
_FIELD = "url.url"


def check_url(url: str, guard: Guard) -> SplitResult:
    """Accepts https URLs without credentials, and http where the allow-list says so.

    Raises:
        InvalidArgument: anything else.
    """
    hint = "Give https://host/path, without a password in it."
    if not url.isprintable() or not url.isascii() or " " in url or len(url) > 2000:
        raise InvalidArgument("the URL has characters that no URL has", field=_FIELD, hint=hint)
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise InvalidArgument(f"{url[:200]!r} is no URL", field=_FIELD, hint=hint) from None
    if parts.scheme != "https" and not (parts.scheme == "http" and guard.admits(url)):
        raise InvalidArgument(f"only https URLs are fetched, not {url[:200]!r}", field=_FIELD, hint=hint)
    if parts.username is not None or parts.password is not None or not parts.hostname:
        raise InvalidArgument("the URL has credentials in it, or no host", field=_FIELD, hint=hint)
    return parts


def download(url: str, sha256: str, to: Path, meter: Meter, guard: Guard, ca_file: Path | None = None) -> None:
    """Writes what the URL gives to a file.

    Args:
        sha256: digest it must have; empty when unknown.
        ca_file: certificates to trust instead of the system's.

    Raises:
        InvalidArgument: the URL, or one it redirects to, is refused.
        SourceUnreachable: the server cannot be reached, does not give it, or breaks off.
        LimitExceeded: it is too large or takes too long.
        UploadMismatch: it has another digest.
    """
    for _ in range(_REDIRECTS + 1):
        parts = check_url(url, guard)
        try:
            location = _get(parts, guard.resolve(url, _FIELD), to, meter, ca_file)
        except (OSError, http.client.HTTPException) as error:
            meter.check_time()
            raise SourceUnreachable(
                f"{url} cannot be fetched: {error or type(error).__name__}", field=_FIELD, hint="Check the URL."
            ) from None
        if location is None:
            break
        url = urljoin(url, location)
    else:
        raise SourceUnreachable(f"{url} redirects too often", field=_FIELD, hint="Give the URL it leads to.")
    if sha256:
        with to.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise UploadMismatch(f"{url} has the SHA-256 {found}, not {sha256}", field="url.sha256", hint="Check both.")


def _get(parts: SplitResult, address: str, to: Path, meter: Meter, ca_file: Path | None) -> str | None:
    """Downloads, or returns where the server redirects to."""
    assert parts.hostname
    port = parts.port or (443 if parts.scheme == "https" else 80)
    plain = socket.create_connection((address, port), timeout=_TIMEOUT)
    # The timeout of a socket begins anew with every byte: a server that drips is cut off by the clock.
    clock = threading.Timer(meter.seconds_left, plain.shutdown, [socket.SHUT_RDWR])
    clock.start()
    connection = http.client.HTTPConnection(parts.hostname, port, timeout=_TIMEOUT)
    try:
        connection.sock = (
            ssl.create_default_context(cafile=ca_file).wrap_socket(plain, server_hostname=parts.hostname)
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
            raise SourceUnreachable(
                f"{parts.geturl()} answers {response.status} {response.reason}", field=_FIELD, hint="Check the URL."
            )
        _save(response, to, meter)
        return None
    finally:
        clock.cancel()
        connection.close()
        plain.close()


def _save(response: http.client.HTTPResponse, to: Path, meter: Meter) -> None:
    expected = response.length
    size = 0
    with to.open("wb") as file:
        # read1: what has arrived, so that a server that drips is noticed by the clock and not by the size.
        while data := response.read1(_CHUNK):
            size += len(data)
            meter.check_time()
            meter.check_size(size)
            meter.tell("downloading", size, expected or 0)
            file.write(data)
    if expected is not None and size != expected:  # http.client takes a connection that breaks off for the end
        raise SourceUnreachable(f"the server broke off after {size:,} of {expected:,} bytes", hint="Try again.")
