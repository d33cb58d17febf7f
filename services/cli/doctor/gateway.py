"""The gateway, as those who call it see it: reached, with a certificate that they trust, and the services behind it."""

from __future__ import annotations

import ipaddress
import json
import socket
import ssl
import time
import warnings
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import urllib3
from cryptography import x509
from urllib3.exceptions import HTTPError, InsecureRequestWarning

from services.cli.control.installation import Installation
from services.cli.doctor import clock
from services.cli.doctor.check import Check, Result, failed, ok, warning

NAME = "gateway"
RENEW = timedelta(days=14)
"""Before its end a certificate is told as one to renew: those that renew themselves have done so by then."""
_TIMEOUT = 5.0
_HINT_URL = "Correct --gateway, or see the gateway's log."


def check(place: Installation, url: str) -> tuple[list[Check], str]:
    """All of it, and the gateway's release, which is empty when it does not tell. Blocks.

    Args:
        url: its address, with http or https.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return [failed(NAME, f"{url!r} is no address", "Give --gateway https://HOST:PORT.")], ""
    is_https = parts.scheme == "https"
    certificate, is_safe = _certificate(parts, place.settings.tls_ca_file) if is_https else _plain(parts.hostname)
    key = place.settings.api_key.get_secret_value() if is_safe else ""
    # Whether it is the right one was said: what it tells besides is looked at all the same, without our key.
    anybody = ssl.create_default_context()
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    with warnings.catch_warnings(), urllib3.PoolManager(timeout=_TIMEOUT, retries=False, ssl_context=anybody) as http:
        warnings.simplefilter("ignore", InsecureRequestWarning)
        try:
            health = http.request("GET", f"{url}/health")
        except HTTPError as error:
            return [failed(NAME, f"{url} does not answer: {_why(error)}", _HINT_URL), *certificate], ""
        version, told = _described(http, url)
        return [_health(url, health.status, health.data), *certificate, *told, *_behind(http, url, key)], version


def _health(url: str, status: int, body: bytes) -> Check:
    if status == 200:
        return ok(NAME, f"answers on {url}")
    return failed(NAME, f"{url} answers {status}: {_message(body)}", "See what is said of the services behind it.")


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "it is no gateway of codegraft, or behind a proxy that has no way to it"


def _described(http: urllib3.PoolManager, url: str) -> tuple[str, list[Check]]:
    """The release that it tells, and its clock."""
    before = time.time()
    try:
        answer = http.request("GET", f"{url}/openapi.json")
        version = str(json.loads(answer.data)["info"]["version"])
        date = parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (HTTPError, ValueError, KeyError, TypeError):
        return "", [warning("gateway's release", "not to be seen", "Let its proxy pass /openapi.json on.")]
    return version, [clock.judge(NAME, clock.skew(date, before, time.time(), resolution=1.0))]


# --- the certificate ---


def _plain(host: str) -> tuple[list[Check], bool]:
    """Without TLS; and whether a key may go that way."""
    if _is_here(host):
        return [], True
    hint = "Give it CODEGRAFT_GATEWAY_CERT_FILE and …_KEY_FILE, or put a proxy with HTTPS before it."
    return [failed("gateway's certificate", "none: keys and code can be read on their way", hint)], False


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _certificate(parts: SplitResult, ca_file: Path | None) -> tuple[list[Check], bool]:
    """Whether callers trust it, and how long; and whether a key may go that way.

    Args:
        ca_file: an authority that is trusted beside the system's.
    """
    name, host, port = "gateway's certificate", parts.hostname or "", parts.port or 443
    trusting = ssl.create_default_context()
    if ca_file is not None:
        trusting.load_verify_locations(ca_file)
    try:
        shown = x509.load_der_x509_certificate(_shown(host, port, None))
    except (OSError, ValueError) as error:
        return [failed(name, f"not to be seen: {_why(error)}", _HINT_URL)], False
    by_date = judge_dates(shown.not_valid_before_utc, shown.not_valid_after_utc, datetime.now(UTC))
    try:
        _shown(host, port, trusting)
    except ssl.SSLCertVerificationError as error:
        if by_date.result is Result.FAILED:  # that is why
            return [by_date], False
        hint = "Have it made for this name by an authority that callers trust; one of your own: CODEGRAFT_TLS_CA_FILE."
        return [failed(name, f"is not trusted: {error.verify_message}", hint)], False
    except OSError as error:
        return [failed(name, f"not to be seen: {_why(error)}", _HINT_URL)], False
    return [by_date], True


def _shown(host: str, port: int, trusting: ssl.SSLContext | None) -> bytes:
    """The certificate in DER that a new connection gets; None trusts all."""
    if trusting is None:
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection((host, port), timeout=_TIMEOUT) as connection,
        trusting.wrap_socket(connection, server_hostname=host) as secure,
    ):
        return secure.getpeercert(binary_form=True) or b""


def judge_dates(begins: datetime, ends: datetime, now: datetime) -> Check:
    """By the time for which a certificate is valid."""
    name, hint = "gateway's certificate", "Renew it: the gateway takes the new files up by itself."
    if now < begins:
        return failed(name, f"is valid from {begins:%F} on", "Look at this machine's clock, else make another one.")
    if now >= ends:
        return failed(name, f"ended on {ends:%F}", hint)
    told = f"is valid until {ends:%F}, {(ends - now).days} days"
    return ok(name, told) if ends - now > RENEW else warning(name, told, hint)


# --- what is behind it ---


def _behind(http: urllib3.PoolManager, url: str, key: str) -> Iterator[Check]:
    """The services as the gateway reaches them, which others may do on another way."""
    name = "behind the gateway"
    try:
        answer = http.request(
            "GET", f"{url}/health/services", headers={"authorization": f"Bearer {key}"} if key else {}
        )
    except HTTPError as error:
        yield failed(name, f"not to be seen: {_why(error)}", _HINT_URL)
        return
    if answer.status in (401, 403):
        yield warning(
            name, f"not to be seen: {_message(answer.data)}", "Set CODEGRAFT_API_KEY, and give an https address."
        )
    elif answer.status != 200:
        yield failed(name, f"not to be seen: {_message(answer.data)}", "Mend that first.")
    else:
        yield judge_services(json.loads(answer.data)["services"])


def judge_services(found: Mapping[str, str]) -> Check:
    """One check of all services behind the gateway, by its word of each."""
    if wrong := [f"{name} {word}" for name, word in found.items() if word != "serving"]:
        hint = (
            "If they serve (see above), correct the gateway's CODEGRAFT_…_ADDRESS, certificates, or a network policy."
        )
        return failed("behind the gateway", ", ".join(wrong), hint)
    return ok("behind the gateway", f"{', '.join(found)} serve")


def _why(error: BaseException) -> str:
    """The reason within what the libraries wrap around it."""
    reason = getattr(error, "reason", None)
    return str(reason if isinstance(reason, str | BaseException) else error) or type(error).__name__
