"""``codegraft credential``: what opens private repositories."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from codegraft.ingest.v1 import credential_pb2
from services.cli.connect import Project, connect, full_name, id_of
from services.cli.output import Json, err, print_json, print_table
from services.core import names
from services.core.errors import InvalidArgument

app = typer.Typer(
    help="Credentials: tokens and SSH keys of private repositories. Secrets are stored encrypted and never shown.",
    no_args_is_help=True,
)

CredentialId = Annotated[str, typer.Argument(metavar="CREDENTIAL", help="Id or full name of the credential.")]
Title = Annotated[str, typer.Option(help="Title for people.")]
KnownHosts = Annotated[
    Path | None, typer.Option(help="File with host keys, as `ssh-keyscan HOST` prints them; - for standard input.")
]
Pin = Annotated[bool, typer.Option("--pin", help="Believe an unknown host's key at the first connection.")]
KINDS = {
    credential_pb2.CREDENTIAL_KIND_HTTPS_TOKEN: "https token",
    credential_pb2.CREDENTIAL_KIND_SSH_KEY: "ssh key",
}


@app.command("add-token")
def add_token(
    project: Project,
    credential: CredentialId,
    username: Annotated[str, typer.Option(help="User name; most servers take any with a token.")] = "",
    token_file: Annotated[Path | None, typer.Option(help="File with the token; - for standard input.")] = None,
    title: Title = "",
    json: Json = False,
) -> None:
    """Store a token for https. It is asked for, or read from a file: never write it on the command line.

    Example: codegraft credential add-token gitlab -p acme --username oauth2
    """
    text = _read(token_file) if token_file else typer.prompt("Token", hide_input=True, err=True)
    with connect() as client:
        added = client.credentials.create_token(
            project, text.strip(), username=username, credential_id=id_of(credential), title=title
        )
    _tell(added, json)


@app.command("add-key")
def add_key(
    project: Project,
    credential: CredentialId,
    key_file: Annotated[Path | None, typer.Option(help="Private key to import; without it a new one is made.")] = None,
    known_hosts: KnownHosts = None,
    pin: Pin = False,
    title: Title = "",
    json: Json = False,
) -> None:
    """Store an SSH key: a new one, whose public half is shown, or an existing one.

    Example: codegraft credential add-key deploy -p acme --known-hosts <(ssh-keyscan git.corp.example)
    """
    secret = credential_pb2.CredentialSecret()
    if key_file is None:
        secret.generate_ssh_key.SetInParent()
    else:
        secret.ssh_private_key.private_key = _read(key_file)
        secret.ssh_private_key.passphrase = os.environ.get("CODEGRAFT_KEY_PASSPHRASE", "")
    with connect() as client:
        added = client.credentials.create(
            project,
            secret,
            credential_id=id_of(credential),
            title=title,
            known_hosts=_read(known_hosts).splitlines() if known_hosts else (),
            pin_on_first_use=pin,
        )
    _tell(added, json)


@app.command("list")
def list_(project: Project, json: Json = False) -> None:
    """List the credentials of a project, without their secrets."""
    with connect() as client:
        found = list(client.credentials.list(project))
    if json:
        print_json(found)
        return
    rows = [
        [
            id_of(one.name),
            KINDS.get(one.kind, ""),
            one.username or one.fingerprint,
            len(one.known_hosts) or "",
            one.use_time.ToDatetime().isoformat(" ", "minutes") if one.HasField("use_time") else "never",
        ]
        for one in found
    ]
    columns = ["CREDENTIAL", "KIND", "USER OR FINGERPRINT", "HOST KEYS", "LAST USED (UTC)"]
    print_table(columns, rows, empty=f"no credential yet: codegraft credential add-key NAME --project {project}")


@app.command()
def show(project: Project, credential: CredentialId, json: Json = False) -> None:
    """Show a credential; of an SSH key the public half, to copy to the repository."""
    with connect() as client:
        _tell(client.credentials.get(full_name(names.CREDENTIAL, credential, project)), json)


@app.command()
def hosts(
    project: Project,
    credential: CredentialId,
    known_hosts: Annotated[Path, typer.Argument(help="File with host keys; - for standard input.")],
    pin: Pin = False,
    json: Json = False,
) -> None:
    """Replace the host keys that are believed with an SSH key.

    Example: ssh-keyscan git.corp.example | codegraft credential hosts deploy - -p acme
    """
    with connect() as client:
        record = client.credentials.get(full_name(names.CREDENTIAL, credential, project))
        record.known_hosts[:] = _read(known_hosts).splitlines()
        record.pin_on_first_use = pin
        _tell(client.credentials.update(record), json)


@app.command()
def delete(project: Project, credential: CredentialId, json: Json = False) -> None:
    """Delete a credential that no source uses."""
    name = full_name(names.CREDENTIAL, credential, project)
    with connect() as client:
        client.credentials.delete(name)
    if json:
        print_json({"deleted": name})
    else:
        err.print(f"deleted {name}")


@app.command("new-key")
def new_key(json: Json = False) -> None:
    """Print a fresh key for CODEGRAFT_INGEST_CREDENTIAL_KEYS, with which a service encrypts credentials."""
    key = base64.urlsafe_b64encode(os.urandom(32)).decode()
    if json:
        print_json({"key": key})
    else:
        print(key)


def _read(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}", field="path", hint="Give a text file.") from None


def _tell(credential: credential_pb2.Credential, as_json: bool) -> None:
    if as_json:
        print_json(credential)
        return
    told = credential.username or credential.fingerprint
    err.print(f"{credential.name}: {KINDS.get(credential.kind, '')} {told}")
    for line in credential.known_hosts:
        err.print(f"  believes {line[:100]}")
    if credential.public_key:
        print(credential.public_key)
