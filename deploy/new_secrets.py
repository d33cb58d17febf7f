"""Makes deploy/secrets: random credentials for compose.yaml, one file for each of those who need them.

    python3 deploy/new_secrets.py [FOLDER]

The folder is closed to everybody else. The files in it are not: compose mounts them as they are, and the services,
which are not root, must be able to read them. Keep the folder: without the key in ingest.toml credentials are lost.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import sys
from pathlib import Path


def make(folder: Path) -> list[Path]:
    """Writes the files.

    Raises:
        FileExistsError: the folder is there: new credentials would not open what the old ones have closed.
    """
    user, password = "codegraft", secrets.token_urlsafe(24)
    access_key, secret_key = secrets.token_hex(10), secrets.token_urlsafe(30)
    sealing = base64.urlsafe_b64encode(os.urandom(32)).decode()
    shared = "".join(
        f"{name} = {json.dumps(value)}\n"
        for name, value in {
            "nats_user": user,
            "nats_password": password,
            "s3_access_key": access_key,
            "s3_secret_key": secret_key,
            "s3_bucket": "codegraft",
        }.items()
    )
    contents = {
        "services.toml": shared,
        "ingest.toml": shared + f"ingest_credential_keys = {json.dumps([sealing])}\n",
        "nats-auth.conf": f"authorization {{ user: {json.dumps(user)}, password: {json.dumps(password)} }}\n",
        "s3-access-key": access_key,
        "s3-secret-key": secret_key,
    }
    folder.mkdir(mode=0o700)
    for name, content in contents.items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o644)
    return [folder / name for name in contents]


def main(folder: Path) -> int:
    """Entry point; the exit status."""
    try:
        made = make(folder)
    except FileExistsError:
        print(f"{folder} is there already; remove it only together with the volumes that it opens", file=sys.stderr)
        return 1
    print("\n".join(map(str, made)))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "secrets"))
