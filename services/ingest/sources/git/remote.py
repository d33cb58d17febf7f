"""A repository elsewhere: the address that was checked, and the credential, shown to nobody but its host.

A credential is in no argument and no variable, where every process list has it, but in files of a folder that only this
user can open and that is removed when git is done.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from services.core.errors import InvalidArgument
from services.ingest.limits import Meter
from services.ingest.sources.git.process import Git
from services.ingest.sources.guard import Guard

NAME = "origin"

_ASKPASS = """#!/bin/sh
# Answers git for the one host whose credential this is.
case "$1" in
"Username for '{scheme}://{place}'"*) cat {folder}/username ;;
"Password for '{scheme}://"*"@{place}'"*) cat {folder}/password ;;
*) exit 1 ;;
esac
"""


@dataclass(frozen=True, slots=True)
class HttpsToken:
    """A user and a token for https."""

    username: str
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class SshKey:
    """A private key for ssh, and the host keys that are believed."""

    private_key: str = field(repr=False)
    """In OpenSSH's format."""
    known_hosts: tuple[str, ...] = ()
    """Lines as in OpenSSH's known_hosts."""
    pin_first: bool = False
    """Believe the key of a host that is not known yet, and remember it."""


Secret = HttpsToken | SshKey


@dataclass(frozen=True, slots=True)
class Remote:
    """git, set up to reach the one repository under the name "origin"."""

    git: Git
    url: str
    pinned: Path | None = None
    """Where ssh notes host keys; lines beyond the known ones were pinned just now."""


@contextmanager
def reach(
    url: str,
    secret: Secret | None,
    guard: Guard,
    folder: Path,
    private: Path,
    meter: Meter,
    ca_file: Path | None = None,
) -> Iterator[Remote]:
    """Sets git up for a URL that check_url returned.

    Args:
        folder: of the bare repository.
        private: an empty folder for the credential.

    Raises:
        InvalidArgument: the host is not to be connected to, or the credential is of the wrong kind.
        SourceUnreachable: its name does not resolve.
    """
    parts = urlsplit(url)
    config = {f"remote.{NAME}.url": url, f"protocol.{parts.scheme}.allow": "always"}
    environment: dict[str, str] = {}
    pinned = None
    if parts.scheme == "file":
        if secret is not None:
            raise InvalidArgument("a local repository needs no credential", field="git.credential", hint="Omit it.")
    else:
        address = guard.resolve(url, "git.url")
    private.mkdir(mode=0o700)
    try:
        if parts.scheme in ("https", "http"):
            port = parts.port or (443 if parts.scheme == "https" else 80)
            bracketed = f"[{address}]" if ":" in address else address
            config["http.curloptResolve"] = f"{parts.hostname}:{port}:{bracketed}"
            if ca_file is not None:
                config["http.sslCAInfo"] = str(ca_file)
            if secret is not None:
                environment |= _askpass(url, secret, private)
        elif parts.scheme == "ssh":
            pinned = private / "known_hosts"
            environment["GIT_SSH_COMMAND"] = _ssh(url, address, secret, private, pinned)
            environment["GIT_SSH_VARIANT"] = "ssh"
        yield Remote(Git(folder, meter, config, environment), url, pinned)
    finally:
        for path in private.iterdir():
            path.unlink()
        private.rmdir()


def _askpass(url: str, secret: Secret, private: Path) -> dict[str, str]:
    if not isinstance(secret, HttpsToken):
        raise InvalidArgument(
            "an SSH key opens no https URL",
            field="git.credential",
            hint="Use the repository's ssh URL, or a credential with a token.",
        )
    parts = urlsplit(url)
    _write(private / "username", secret.username)
    _write(private / "password", secret.token)
    script = _ASKPASS.format(scheme=parts.scheme, place=parts.netloc, folder=shlex.quote(str(private)))
    _write(private / "askpass", script, mode=0o700)
    return {"GIT_ASKPASS": str(private / "askpass")}


def _ssh(url: str, address: str, secret: Secret | None, private: Path, pinned: Path) -> str:
    if isinstance(secret, HttpsToken):
        raise InvalidArgument(
            "a token opens no ssh URL",
            field="git.credential",
            hint="Use the repository's https URL, or a credential with an SSH key.",
        )
    _write(pinned, "".join(line + "\n" for line in secret.known_hosts) if secret else "")
    checking = "accept-new" if secret and secret.pin_first else "yes"
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": "20",
        "ServerAliveInterval": "15",
        "GlobalKnownHostsFile": "/dev/null",
        "UserKnownHostsFile": str(pinned),
        "StrictHostKeyChecking": checking,
        "UpdateHostKeys": "no",
        "HashKnownHosts": "no",
        "CheckHostIP": "no",
        "HostName": address,
        # Under this name the host is looked up in known_hosts, whatever its address.
        "HostKeyAlias": host_name(url),
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "IdentityFile": "none",
        "PreferredAuthentications": "publickey",
        "PermitLocalCommand": "no",
        "ProxyCommand": "none",
        "ForwardAgent": "no",
    }
    if secret is not None:
        _write(private / "key", secret.private_key)
        options["IdentityFile"] = str(private / "key")
    told = " ".join(f"-o {shlex.quote(f'{key}={value}')}" for key, value in options.items())
    return f"ssh -F /dev/null {told}"


def host_name(url: str) -> str:
    """The host of an ssh URL as known_hosts spells it."""
    parts = urlsplit(url)
    return f"[{parts.hostname}]:{parts.port}" if parts.port not in (None, 22) else parts.hostname or ""


def _write(path: Path, text: str, mode: int = 0o600) -> None:
    path.touch(mode=mode)
    path.write_text(text)
