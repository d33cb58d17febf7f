"""Who may speak to the gateway at all: names that are its own, and no web page that was not named.

Requests without an Origin header come from programs. A browser sends it with every request that could do harm; a page
of another origin could otherwise call a gateway on its user's machine, through its address or through a name of its own
that it lets point there (DNS rebinding).
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers

from services.gateway.config import GatewaySettings
from services.gateway.edge.problems import Refused

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Guard:
    """The two questions, for one set of settings."""

    def __init__(self, settings: GatewaySettings) -> None:
        own = settings.listen.rpartition(":")[0].lower()
        self._hosts = {host.lower() for host in settings.gateway_hosts}
        if self._hosts or own in _LOOPBACK:
            self._hosts |= _LOOPBACK | {own}
        self._origins = {origin.lower().rstrip("/") for origin in settings.gateway_origins}

    def check(self, headers: Headers, scheme: str) -> None:
        """Lets a request pass.

        Args:
            scheme: https where we speak it ourselves. Who can make pages for our name over plain http, which needs no
                certificate, is another origin then.

        Raises:
            Refused: it came by another name, or from another origin's page.
        """
        authority = headers.get("host", "").lower()
        if self._hosts and _name(authority) not in self._hosts:
            raise Refused(421, "UNKNOWN_HOST", "This host name is not the gateway's. See CODEGRAFT_GATEWAY_HOSTS.")
        origin = headers.get("origin", "").lower()
        own = _authority(origin) == authority and (scheme != "https" or origin.startswith("https:"))
        if origin and origin not in self._origins and not own:
            raise Refused(403, "FOREIGN_ORIGIN", "Pages of other origins are refused. See CODEGRAFT_GATEWAY_ORIGINS.")


def _name(authority: str) -> str:
    """The host without its port."""
    head, colon, port = authority.rpartition(":")
    return head if colon and port.isdecimal() else authority


def _authority(origin: str) -> str:
    """host:port of an origin; "null" and nonsense have none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""
