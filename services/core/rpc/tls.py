"""TLS on both sides of gRPC: server credentials that are read anew when their files change, and those of a client.

Imports nothing but grpc, so that the client needs no more.
"""

from __future__ import annotations

import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc

from services.core.errors import InvalidArgument


class ServerFiles(Protocol):
    """The settings of a server."""

    @property
    def tls_cert_file(self) -> Path | None: ...
    @property
    def tls_key_file(self) -> Path | None: ...
    @property
    def tls_client_ca_file(self) -> Path | None: ...


@dataclass(frozen=True, slots=True)
class ClientFiles:
    """What a client needs to call servers with TLS."""

    ca: Path
    """Certificates (PEM) of which one must have signed the server's."""
    cert: Path | None = None
    """Certificate (PEM) to show to a server that asks for one (mutual TLS)."""
    key: Path | None = None
    """Its private key (PEM)."""

    def credentials(self) -> grpc.ChannelCredentials:
        """For a secure channel.

        Raises:
            InvalidArgument: a file cannot be used, or only one of certificate and key is there. gRPC itself would end
                the process.
        """
        if (self.cert is None) != (self.key is None):
            given, missing = ("KEY", "CERT") if self.cert is None else ("CERT", "KEY")
            raise InvalidArgument(
                f"there is a client's TLS {given.lower()} file without its {missing.lower()} file",
                field=f"CODEGRAFT_TLS_{missing}_FILE",
                hint=f"Set CODEGRAFT_TLS_{missing}_FILE, too, or unset CODEGRAFT_TLS_{given}_FILE.",
            )
        variable, file = "CODEGRAFT_TLS_CA_FILE", self.ca
        try:
            # OpenSSL looks first: what gRPC can make nothing of, it tells nobody, or dies of.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(self.ca)
            if self.cert is None or self.key is None:
                return grpc.ssl_channel_credentials(self.ca.read_bytes())
            variable, file = "CODEGRAFT_TLS_CERT_FILE", self.cert
            context.load_cert_chain(self.cert, self.key)
            return grpc.ssl_channel_credentials(self.ca.read_bytes(), self.key.read_bytes(), self.cert.read_bytes())
        except OSError as error:  # OpenSSL's errors are such, too
            verb = "used" if isinstance(error, ssl.SSLError) else "read"
            raise InvalidArgument(
                f"{file} cannot be {verb}: {error.strerror or error}",
                field=variable,
                hint="Give PEM files; of certificate and key those that belong together.",
            ) from None


def server_credentials(files: ServerFiles) -> grpc.ServerCredentials | None:
    """Credentials of a server; None when the settings name no certificate.

    The files are looked at at every handshake: a renewed certificate counts from the next connection on. One that does
    not fit its key, as while only one of the two files was replaced, leaves the old ones in use.

    Raises:
        InvalidArgument: the files cannot be used.
    """
    cert, key = files.tls_cert_file, files.tls_key_file
    if cert is None and key is None:
        if files.tls_client_ca_file is not None:
            raise _unusable("CODEGRAFT_TLS_CLIENT_CA_FILE needs CODEGRAFT_TLS_CERT_FILE and CODEGRAFT_TLS_KEY_FILE")
        return None
    if cert is None or key is None:
        raise _unusable("CODEGRAFT_TLS_CERT_FILE and CODEGRAFT_TLS_KEY_FILE go together")
    watched = _Watched(cert, key, files.tls_client_ca_file)
    return grpc.dynamic_ssl_server_credentials(
        watched.read(),
        watched.changed,  # type: ignore[arg-type]  # None means "unchanged", which the stubs do not know
        require_client_authentication=files.tls_client_ca_file is not None,
    )


class _Watched:
    """Files that are read again once they changed. grpc asks from threads of its own."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._lock = threading.Lock()
        self._seen = self._marks()

    def read(self) -> grpc.ServerCertificateConfiguration:
        """What the files hold.

        Raises:
            InvalidArgument: that cannot be used.
        """
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._cert, self._key)
            if self._client_ca is not None:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(self._client_ca)
            return grpc.ssl_server_certificate_configuration(
                [(self._key.read_bytes(), self._cert.read_bytes())],
                self._client_ca.read_bytes() if self._client_ca is not None else None,
            )
        except (OSError, ssl.SSLError) as error:
            raise _unusable(f"the certificate {self._cert} and the key {self._key} cannot be used: {error}") from None

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """What the files hold when they changed and can be used; None otherwise."""
        with self._lock:
            try:
                marks = self._marks()
                if marks == self._seen:
                    return None
                found = self.read()
            except (OSError, InvalidArgument):
                return None  # asked again at the next handshake
            self._seen = marks
            return found

    def _marks(self) -> list[tuple[int, int, int]]:
        files = [self._cert, self._key, *([self._client_ca] if self._client_ca else [])]
        return [(found.st_ino, found.st_size, found.st_mtime_ns) for found in (file.stat() for file in files)]


def _unusable(message: str) -> InvalidArgument:
    return InvalidArgument(message, field="CODEGRAFT_TLS_CERT_FILE", hint="Give PEM files that belong together.")
