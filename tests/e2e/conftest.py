"""The stack that the end-to-end tests share: each story has a project of its own in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

CODEGRAFT = [sys.executable, "-m", "services.cli.main"]


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Addresses of the services of a real stack, its operator's key, its folder. It may fetch from here over ssh."""
    data = tmp_path_factory.mktemp("stack")
    command = [*CODEGRAFT, "up", "--detach", "--json", "--data", str(data)]
    environment = {**os.environ, "CODEGRAFT_INGEST_ALLOWED_NETWORKS": json.dumps(["127.0.0.0/8"])}
    up = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        addresses = {service["name"]: service["address"] for service in json.loads(up.stdout)["services"]}
        key = json.loads((data / "credentials.json").read_text())["api_key"]
        yield addresses | {"key": key, "data": str(data)}
    finally:
        subprocess.run([*CODEGRAFT, "down", "--data", str(data)], check=True, timeout=60)
