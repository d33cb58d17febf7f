"""``codegraft key``: API keys, with which callers show who they are."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated

import typer

from codegraft.access.v1 import access_pb2
from services.cli.connect import connect, id_of
from services.cli.output import Json, err, print_json, print_table
from services.core.errors import InvalidArgument

app = typer.Typer(
    help="API keys: who may do what in which projects. Secrets are shown once, when they are made.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(metavar="KEY", help="Id of the key, such as ci.")]


class RoleName(StrEnum):
    """Roles as the command line spells them."""

    READER = "reader"
    COMPLETER = "completer"
    CONTRIBUTOR = "contributor"
    OPERATOR = "operator"


@app.command()
def create(
    key: Name,
    role: Annotated[
        RoleName,
        typer.Option(
            help="reader looks; completer completes, too; contributor adds and trains, too; operator does all."
        ),
    ],
    project: Annotated[list[str] | None, typer.Option("--project", "-p", help="Project it is for; repeatable.")] = None,
    all_projects: Annotated[bool, typer.Option("--all-projects", help="For all projects, those to come too.")] = False,
    expires: Annotated[str, typer.Option(help="Ends after so long: 90d, 12h or 30m; never without.")] = "",
    title: Annotated[str, typer.Option(help="Who or what uses it.")] = "",
    json: Json = False,
) -> None:
    """Make a key. Its secret goes to standard output, and is shown only now.

    Example: codegraft key create ci --role contributor -p acme --expires 90d > ci.key
    """
    ends = datetime.now(UTC) + duration(expires, "--expires") if expires else None
    with connect() as client:
        made, secret = client.keys.create(
            getattr(access_pb2, f"ROLE_{role.name}"),
            projects=project or (),
            all_projects=all_projects,
            key_id=id_of(key),
            title=title,
            expires=ends,
        )
    _tell_secret(made, secret, json)


@app.command("list")
def list_(json: Json = False) -> None:
    """List the keys of your projects, without their secrets."""
    with connect() as client:
        keys = list(client.keys.list())
    if json:
        print_json(keys)
        return
    rows = [[id_of(key.name), _role(key.role), _projects(key), _state(key), key.title] for key in keys]
    print_table(["KEY", "ROLE", "PROJECTS", "STATE", "TITLE"], rows, empty="no key: codegraft key create --help")


@app.command()
def rotate(
    key: Name,
    overlap: Annotated[str, typer.Option(help="How long the old secret works on: 1d, 2h, 0m.")] = "1d",
    json: Json = False,
) -> None:
    """Give a key a new secret, while the old one works for some time longer.

    Example: codegraft key rotate ci --overlap 2h > ci.key
    """
    with connect() as client:
        rotated, secret = client.keys.rotate(key, overlap=duration(overlap, "--overlap"))
    _tell_secret(rotated, secret, json)


@app.command()
def revoke(key: Name, json: Json = False) -> None:
    """End a key for ever: within seconds no service takes it any more, and its running streams end."""
    with connect() as client:
        revoked = client.keys.revoke(key)
    if json:
        print_json(revoked)
    else:
        err.print(f"revoked {revoked.name}")


@app.command()
def whoami(json: Json = False) -> None:
    """Show as whom you call, and what you may do."""
    with connect() as client:
        caller = client.keys.whoami()
    if json:
        print_json(caller)
    else:
        err.print(f"{caller.subject}: {_role(caller.role)} in {_projects(caller)}")


def _tell_secret(key: access_pb2.Key, secret: str, as_json: bool) -> None:
    if as_json:
        print_json({"key": key, "secret": secret})
        return
    err.print(f"{key.name}: {_role(key.role)} in {_projects(key)}. Its secret is shown only now:")
    print(secret)


def _role(role: int) -> str:
    return access_pb2.Role.Name(role).removeprefix("ROLE_").lower()


def _projects(of: access_pb2.Key | access_pb2.GetCallerResponse) -> str:
    return "all projects" if of.all_projects else ", ".join(map(id_of, of.projects)) or "deleted projects"


def _state(key: access_pb2.Key) -> str:
    if key.HasField("revoke_time"):
        return "revoked"
    if not key.HasField("expire_time"):
        return "valid"
    ends = key.expire_time.ToDatetime(UTC)
    return f"{'valid until' if ends > datetime.now(UTC) else 'expired'} {ends:%Y-%m-%d %H:%M}"


def duration(text: str, option: str) -> timedelta:
    """The time that 90d, 12h or 30m means. Raises InvalidArgument, which names the option."""
    match = re.fullmatch(r"(\d{1,6})([dhm])", text)
    if match is None:
        raise InvalidArgument(f"{option} {text!r} is no duration", field=option, hint="Give 90d, 12h or 30m.")
    unit = {"d": "days", "h": "hours", "m": "minutes"}[match[2]]
    return timedelta(**{unit: int(match[1])})
