"""Which hosts may be fetched from: public ones, and what the operator's allow-list names.

Names are resolved once, here; whoever connects uses the address that was checked. A name that resolves to something
else a moment later (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import ipaddress
import posixpath
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

from services.core.errors import InvalidArgument, SourceUnreachable

_PORTS = {"https": 443, "http": 80, "ssh": 22}


@dataclass(frozen=True, slots=True)
class Guard:
    """The operator's exceptions."""

    urls: Sequence[str] = ()
    """URL prefixes that are fetched although they are not https or ssh, or lead to a private address. A prefix admits
    the same scheme, host and port, and the same folder or what lies below it."""
    networks: Sequence[str] = ()
    """Networks (CIDR) whose addresses may be connected to, for example 10.1.0.0/16."""

    def admits(self, url: str) -> bool:
        """Whether an entry of the allow-list covers the URL."""
        return any(_covers(entry, url) for entry in self.urls)

    def resolve(self, url: str, field: str) -> str:
        """The address to connect to for the URL.

        Raises:
            InvalidArgument: any of the host's addresses is not a public one, and no entry admits it.
            SourceUnreachable: the name does not resolve.
        """
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 0)
        try:
            found = sorted({str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
        except (OSError, UnicodeError) as error:
            raise SourceUnreachable(
                f"the host {host[:200]!r} cannot be resolved: {getattr(error, 'strerror', '') or error}",
                field=field,
                hint="Check the URL.",
            ) from None
        if not self.admits(url) and not all(self._is_open(address) for address in found):
            raise InvalidArgument(
                f"{host} is not on the public internet",
                field=field,
                hint="Upload it instead, or let an operator name it in CODEGRAFT_INGEST_ALLOWED_URLS or "
                "CODEGRAFT_INGEST_ALLOWED_NETWORKS.",
            )
        return found[0]

    def _is_open(self, text: str) -> bool:
        address = ipaddress.ip_address(text.split("%")[0])
        if isinstance(address, ipaddress.IPv6Address):
            # An IPv4 address in IPv6 clothes leads where the IPv4 address leads.
            address = address.ipv4_mapped or address.sixtofour or _nat64(address) or address
        named = any(address in network for network in map(ipaddress.ip_network, self.networks))
        return named or (address.is_global and not address.is_multicast)


def _nat64(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if address in ipaddress.ip_network("64:ff9b::/96"):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None


def _covers(entry: str, url: str) -> bool:
    """Compares the parts, not the letters: https://good.example admits no https://good.example.evil.org."""
    try:
        allowed, asked = urlsplit(entry), urlsplit(url)
        same_place = _origin(allowed) == _origin(asked) and (not allowed.username or allowed.username == asked.username)
    except ValueError:
        return False
    return bool(allowed.scheme) and same_place and _is_below(asked.path, allowed.path)


def _origin(parts: SplitResult) -> tuple[str, str, int | None]:
    return parts.scheme, parts.hostname or "", parts.port or _PORTS.get(parts.scheme)


def _is_below(path: str, folder: str) -> bool:
    plain, top = posixpath.normpath("/" + unquote(path)), posixpath.normpath("/" + unquote(folder))
    if "\0" in plain or ".." in unquote(path).split("/"):
        return False
    return top in ("/", "//") or plain == top or plain.startswith(top + "/")
