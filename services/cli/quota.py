"""``codegraft quota``: how much a project or a key may use."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from codegraft.access.v1.quota_pb2 import Limits, SetQuotaResponse, StorageUsage
from services.cli.connect import connect
from services.cli.output import Json, err, print_json, print_table
from services.core import names
from services.core.errors import InvalidArgument, PermissionDenied, Unavailable

app = typer.Typer(
    help="Quotas: how much a project or a key may use. A call has to fit its project's and its key's; who is over a "
    "limit is told when there will be room.",
    no_args_is_help=True,
)
_FIELDS = {
    "requests_per_minute": "requests a minute",
    "tokens_per_minute": "tokens a minute",
    "storage_bytes": "bytes of storage",
    "runs": "runs at once",
    "scans": "scans at once",
}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_VALUE = "A number, none (no limit) or default."
Project = Annotated[str, typer.Option("--project", "-p", help="Project whose quota it is.")]
Key = Annotated[str, typer.Option("--key", "-k", help="Key whose quota it is, such as ci.")]


@app.command()
def show(project: Project = "", key: Key = "", json: Json = False) -> None:
    """Show what a project or a key may use, and what it uses; of storage, what for.

    Rates are those of all services and replicas together.
    Example: codegraft quota show -p acme
    """
    owner = _owner(project, key)
    with connect() as client:
        found, used, stored = client.quotas.get(owner), Limits(), StorageUsage()
        try:
            used, stored = client.quotas.usage(owner), client.quotas.stored(owner)
        except (PermissionDenied, Unavailable) as error:  # what it may use can be told nevertheless
            err.print(f"what it uses is not known: {error.message}")
    if json:
        print_json({"quota": found.quota, "effective": found.effective, "used": used, "storage": stored})
        return
    rows = []
    for field, words in _FIELDS.items():
        limit, own = _number(found.effective, field, "no limit"), _word(found.quota.limits, field)
        rows.append([words, limit, _number(used, field, "-"), own])
        if field == "storage_bytes":
            kinds = [(kind.name.replace("_", " "), size) for kind, size in stored.ListFields()]
            rows += [[f"  of {kind}", "", f"{size:,}", ""] for kind, size in kinds]
    print_table(["WHAT", "LIMIT", "USED", "SET"], rows, empty="")


@app.command("set")
def set_(
    project: Project = "",
    key: Key = "",
    requests: Annotated[str, typer.Option(help=f"Calls that may begin in a minute, at all services. {_VALUE}")] = "",
    tokens: Annotated[
        str, typer.Option(help=f"Tokens of prompts and completions in a minute, at all replicas. {_VALUE}")
    ] = "",
    storage: Annotated[
        str, typer.Option(help="Bytes of uploads, sources, datasets and adapters: 20G, 500M, none, default.")
    ] = "",
    runs: Annotated[str, typer.Option(help=f"Runs that are queued or running. {_VALUE}")] = "",
    scans: Annotated[str, typer.Option(help=f"Scans that are queued or running. {_VALUE}")] = "",
    json: Json = False,
) -> None:
    """Set what a project or a key may use; what is not named stays as it is. It counts at once, everywhere.

    A project's quota is set by operators of all projects, a key's by operators of all its projects. 0 lets nothing
    through; default is what the settings of the services say (CODEGRAFT_QUOTA_PROJECT, CODEGRAFT_QUOTA_KEY).
    Examples: codegraft quota set -p acme --tokens 200000 --storage 20G --runs 2
              codegraft quota set -k ci --requests 600 --tokens default
    """
    owner = _owner(project, key)
    asked = dict(zip(_FIELDS, (requests, tokens, storage, runs, scans), strict=True))
    if not any(asked.values()):
        raise InvalidArgument(
            "no limit is named",
            field="--requests",
            hint="Give any of --requests, --tokens, --storage, --runs, --scans.",
        )
    values = {field: _value(text, field) for field, text in asked.items() if text}
    with connect() as client:
        there = client.quotas.get(owner).quota
        for field, value in values.items():
            there.limits.ClearField(field)
            if value is not None:
                setattr(there.limits, field, value)
        stored = client.quotas.set(owner, there.limits, etag=there.etag)
    _tell(owner, stored, json)


def _tell(owner: str, stored: SetQuotaResponse, as_json: bool) -> None:
    if as_json:
        print_json({"quota": stored.quota, "effective": stored.effective})
        return
    limits = [f"{_number(stored.effective, field, 'no limit of')} {words}" for field, words in _FIELDS.items()]
    err.print(f"{owner}: {', '.join(limits)}")


def _owner(project: str, key: str) -> str:
    if bool(project) == bool(key):
        raise InvalidArgument("whose quota is it?", field="--project", hint="Give one of --project and --key.")
    if key:
        return names.build(names.KEY, key=key.removeprefix("keys/"))
    return names.build(names.PROJECT, project=project.removeprefix("projects/"))


def _value(text: str, field: str) -> int | None:
    """The limit that a word means; None for the default, -1 for none."""
    if text in ("none", "default"):
        return -1 if text == "none" else None
    match = re.fullmatch(r"(\d{1,12})([KMGT]?)B?", text)
    if match is None or (match[2] and field != "storage_bytes"):
        option = f"--{field.partition('_')[0]}"
        raise InvalidArgument(
            f"{option} {text!r} is no limit", field=option, hint="Give a number, none or default; of bytes also 20G."
        )
    return int(match[1]) * _UNITS[match[2]]


def _number(limits: Limits, field: str, absent: str) -> str:
    return f"{getattr(limits, field):,}" if limits.HasField(field) else absent


def _word(limits: Limits, field: str) -> str:
    """What an operator has set."""
    value = _number(limits, field, "default")
    return "none" if value == "-1" else value
