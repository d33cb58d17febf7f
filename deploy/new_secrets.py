"""Makes random credentials, each for the one service that needs it.

    python3 deploy/new_secrets.py [FOLDER]          for compose.yaml: files in deploy/secrets
    python3 deploy/new_secrets.py --kubernetes      for the Helm chart: a list of Secrets, to standard output

An object store that is there already: its keys are taken from S3_ACCESS_KEY and S3_SECRET_KEY.

The folder is closed to everybody else. The files in it are not: compose mounts them as they are, and the services,
which are not root, must be able to read them. Keep what this makes: without the keys of ingest credentials are lost.
Needs nothing but Python.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import sys
from pathlib import Path

SERVICES = ("ingest", "scanner", "trainer", "inference")
CALLERS = {"trainer": "reader", "inference": "contributor"}
"""Services that call others, with the roles of their keys."""
NATS_USERS = Path(__file__).parent / "helm/codegraft/files/nats-users.conf"
OPERATOR = "{user: operator, password: $OPERATOR_PASSWORD}\n"
"""A person's user, for backups: may do everything."""

Credentials = dict[str, dict[str, str]]
"""By service, and beside them "gateway", "minio" and "operator": name -> value, as in the chart's Secrets."""


def credentials() -> Credentials:
    """Fresh ones."""
    access_key = os.environ.get("S3_ACCESS_KEY") or secrets.token_hex(10)
    secret_key = os.environ.get("S3_SECRET_KEY") or secrets.token_urlsafe(30)
    store = {"s3-access-key": access_key, "s3-secret-key": secret_key}
    made: Credentials = {service: {"nats-password": secrets.token_urlsafe(24), **store} for service in SERVICES}
    seeds = [{"key": _api_key("operator"), "role": "operator"}]
    made["operator"] = {"api-key": seeds[0]["key"], "nats-password": secrets.token_urlsafe(24)}
    for service, role in CALLERS.items():
        seeds.append({"key": _api_key(service), "role": role})
        made[service]["api-key"] = seeds[-1]["key"]
    made["ingest"]["seed-keys"] = json.dumps(seeds)
    made["ingest"]["credential-keys"] = json.dumps([base64.urlsafe_b64encode(os.urandom(32)).decode()])
    made["gateway"] = {"console-key": secrets.token_urlsafe(32)}
    made["minio"] = store
    return made


def _api_key(id: str) -> str:
    return f"cg_{id}_{secrets.token_urlsafe(32)}"


def kubernetes(made: Credentials) -> str:
    """Secrets of the names that the chart's values have by default."""
    items = [
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": f"codegraft-{name}"}, "stringData": values}
        for name, values in made.items()
    ]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items}, indent=2)


def files(made: Credentials) -> dict[str, str]:
    """Contents of the files that compose.yaml mounts, by name."""
    users = NATS_USERS.read_text() + OPERATOR
    for user in (*SERVICES, "operator"):
        users = users.replace(f"${user.upper()}_PASSWORD", json.dumps(made[user]["nats-password"]))
    return {
        **{f"{service}.toml": _toml(service, made[service]) for service in SERVICES},
        "gateway.toml": f"gateway_console_key = {json.dumps(made['gateway']['console-key'])}\n",
        "nats-auth.conf": f"authorization {{ users: [\n{users}] }}\n",
        "operator.key": made["operator"]["api-key"] + "\n",
        **made["minio"],
    }


def _toml(service: str, values: dict[str, str]) -> str:
    """Settings of a service; lists, which are JSON in a Secret, as TOML has them."""
    lines = [f"nats_user = {json.dumps(service)}"]
    for name, value in values.items():
        match name:
            case "seed-keys":
                seeds = json.loads(value)
                tables = [f"{{ key = {json.dumps(one['key'])}, role = {json.dumps(one['role'])} }}" for one in seeds]
                lines.append(f"ingest_seed_keys = [{', '.join(tables)}]")
            case "credential-keys":
                lines.append(f"ingest_credential_keys = {value}")
            case _:
                lines.append(f"{name.replace('-', '_')} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def write(folder: Path, made: Credentials) -> list[Path]:
    """Writes the files.

    Raises:
        FileExistsError: the folder is there: new credentials would not open what the old ones have closed.
    """
    folder.mkdir(mode=0o700)
    for name, content in files(made).items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o644)
    return sorted(folder.iterdir())


def main(arguments: list[str]) -> int:
    """Entry point; the exit status."""
    if arguments == ["--kubernetes"]:
        print(kubernetes(credentials()))
        return 0
    folder = Path(arguments[0]) if arguments else Path(__file__).parent / "secrets"
    try:
        made = write(folder, credentials())
    except FileExistsError:
        print(f"{folder} is there already; remove it only together with the volumes that it opens", file=sys.stderr)
        return 1
    print("\n".join(map(str, made)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
