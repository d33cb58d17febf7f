"""HTTPS of the gateway itself: a certificate that is read anew when its files change.

It is looked at at every handshake, as the gRPC servers do (services/core/rpc/tls.py): a renewed certificate counts from
the next connection on. One that does not fit its key, as while only one of the two files was replaced, leaves the old
one in use.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from services.core import log
from services.core.errors import InvalidArgument
from services.gateway.config import GatewaySettings

_logger = log.get("gateway.https")


def context(settings: GatewaySettings) -> ssl.SSLContext | None:
    """What connections are accepted with; None when the settings name no certificate.

    Raises:
        InvalidArgument: only one of the two files is named, or they cannot be used.
    """
    cert, key = settings.gateway_cert_file, settings.gateway_key_file
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        missing = "CODEGRAFT_GATEWAY_CERT_FILE" if cert is None else "CODEGRAFT_GATEWAY_KEY_FILE"
        raise InvalidArgument(
            "a certificate and its key go together",
            field=missing,
            hint="Name both files, or none for plain HTTP behind a proxy.",
        )
    return _Renewed(cert, key).first


class _Renewed:
    """The certificate of two files; belongs to the event loop that accepts connections."""

    def __init__(self, cert: Path, key: Path) -> None:
        self._cert, self._key = cert, key
        self._seen = self._refused = self._marks()
        self.first = self._now = _read(cert, key)
        """Every handshake begins with it, and goes on with what the files hold then."""
        self.first.sni_callback = self._choose

    def _choose(self, connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, first: ssl.SSLContext) -> None:
        try:
            marks = self._marks()
            if marks not in (self._seen, self._refused):
                self._refused = marks  # said once, until they change again
                self._now, self._seen = _read(self._cert, self._key), marks
                _logger.info("the certificate was renewed", file=str(self._cert))
        except (OSError, InvalidArgument) as error:
            _logger.warning("the new certificate cannot be used, the old one stays", error=str(error))
        if self._now is not first:
            connection.context = self._now

    def _marks(self) -> list[tuple[int, int, int]]:
        found = [file.stat() for file in (self._cert, self._key)]
        return [(each.st_ino, each.st_size, each.st_mtime_ns) for each in found]


def _read(cert: Path, key: Path) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.set_alpn_protocols(["http/1.1"])
    try:
        made.load_cert_chain(cert, key, password="")  # an encrypted key must not ask on a terminal
    except (OSError, ssl.SSLError) as error:
        raise InvalidArgument(
            f"the certificate {cert} and the key {key} cannot be used: {error}",
            field="CODEGRAFT_GATEWAY_CERT_FILE",
            hint="Give PEM files that belong together; the key without a password.",
        ) from None
    return made
