"""git http-backend behind a small HTTP server, as a company's git server would answer: with a password, over TLS, with
redirects, and slow, when a test asks for that."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import os
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass
class GitServer:
    """A running server over a folder of repositories."""

    root: Path
    url: str = ""
    """Ends in a slash."""
    password: tuple[str, str] | None = None
    """User and password that it asks for."""
    redirect: str = ""
    """Where it redirects every request, when set."""
    dumb: bool = False
    """Serve the repository's files as they lie there, as the old protocol has it."""
    hold: threading.Event | None = None
    """Before the body of every answer it waits until this is set."""
    drip_seconds: float = 0
    """Pause before the body of every answer."""
    endless: bool = False
    """Answer a fetch with progress messages that never end."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(Authorization, path) of each request so far."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # As every real server has it: else each answer on a kept connection waits 40 ms for the client's delayed ACK.
    disable_nagle_algorithm = True
    git: GitServer

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(body)

    def _answer(self, body: bytes) -> None:
        git = self.git
        authorization = self.headers.get("Authorization", "")
        git.requests.append((authorization, self.path))
        if git.redirect:
            return self._send(302, {"Location": git.redirect + self.path}, b"")
        if git.password is not None:
            wanted = "Basic " + base64.b64encode(":".join(git.password).encode()).decode()
            if authorization != wanted:
                return self._send(401, {"WWW-Authenticate": 'Basic realm="git"'}, b"who are you?")
        path, _, query = self.path.partition("?")
        if git.dumb:
            file = git.root / path.lstrip("/")
            found = file.is_file()
            return self._send(200 if found else 404, {}, file.read_bytes() if found else b"")
        if git.endless and path.endswith("git-upload-pack") and b"fetch" in body:
            self.send_response(200)
            self.send_header("Content-Type", "application/x-git-upload-pack-result")
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b"000dpackfile\n")
            while True:
                self.wfile.write(b"%04x" % 1005 + b"\2" + b"x" * 999 + b"\n")
        environment = {
            "GIT_PROJECT_ROOT": str(git.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "GIT_CONFIG_COUNT": "2",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
            "GIT_CONFIG_KEY_1": "uploadpack.allowFilter",
            "GIT_CONFIG_VALUE_1": "true",
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "PATH": os.environ["PATH"],
        }
        answer = subprocess.run(["git", "http-backend"], env=environment, input=body, capture_output=True, check=True)
        head, _, content = answer.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        time.sleep(git.drip_seconds)
        if git.hold is not None:
            git.hold.wait(60)
        self._send(int(headers.pop("Status", "200 OK").split()[0]), headers, content)

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(root: Path, tls: tuple[Path, Path] | None = None) -> Iterator[GitServer]:
    """Serves the repositories in a folder.

    Args:
        tls: certificate and key; None for plain http.
    """
    git = GitServer(root)
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"git": git}))
    http.daemon_threads = True
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        http.socket = context.wrap_socket(http.socket, server_side=True)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    git.url = f"{'https' if tls else 'http'}://127.0.0.1:{http.server_address[1]}/"
    try:
        yield git
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    encoding = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    paths[1].write_bytes(key.private_bytes(*encoding))
    return paths
