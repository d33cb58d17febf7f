"""The data folder: one supervisor at a time, private credentials, a description that never lies about what runs."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from services.cli.local.files import DataFolder, ProcessInfo, StackInfo, StackState
from services.cli.local.permissions import SERVICES
from services.core.errors import FailedPrecondition


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    folder = DataFolder(tmp_path / "data")
    folder.create()
    return folder


def test_credentials_are_private_random_and_kept(folder: DataFolder, tmp_path: Path) -> None:
    first = folder.credentials()
    mode = stat.S_IMODE((folder.root / "credentials.json").stat().st_mode)
    assert mode == 0o600
    assert folder.credentials() == first
    other = DataFolder(tmp_path / "other")
    other.create()
    assert other.credentials().nats_password != first.nats_password
    assert first.s3_secret_key not in repr(first)
    assert len(first.s3_secret_key) >= 32


def test_what_an_older_version_did_not_write_is_added_and_the_rest_kept(folder: DataFolder) -> None:
    path = folder.root / "credentials.json"
    first = json.loads(json.dumps(asdict(folder.credentials())))
    path.write_text(
        json.dumps({key: value for key, value in first.items() if key not in ("api_key", "console_key", "services")})
    )
    again = folder.credentials()
    assert (again.nats_password, again.ingest_key) == (first["nats_password"], first["ingest_key"])
    assert again.api_key.startswith("cg_local_") and len(again.console_key) >= 32 and set(again.services) == {*SERVICES}
    assert folder.credentials() == again
    secrets = [value for each in again.services.values() for value in asdict(each).values()]
    secrets.append(again.console_key)
    assert len(set(secrets)) == len(secrets), "no two services share a secret"
    assert not any(secret in repr(again) for secret in secrets)


def test_damaged_credentials_are_refused(folder: DataFolder) -> None:
    (folder.root / "credentials.json").write_text("{}")
    with pytest.raises(FailedPrecondition, match="damaged"):
        folder.credentials()


def test_only_one_supervisor_holds_the_lock(folder: DataFolder) -> None:
    assert folder.supervisor() is None
    assert folder.acquire()
    second = DataFolder(folder.root)
    assert not second.acquire()
    assert second.supervisor() == os.getpid()
    folder.release()
    assert second.supervisor() is None
    assert second.acquire()
    second.release()


def test_a_killed_supervisor_leaves_the_stack_stopped(folder: DataFolder) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from services.cli.local.files import *\n"
        "folder = DataFolder(Path(sys.argv[1])); assert folder.acquire()\n"
        "process = ProcessInfo('nats', 1, '127.0.0.1:1', 'log')\n"
        "folder.describe(StackInfo(StackState.READY, os.getpid(), {'nats': process}))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(folder.root)], check=False)
    assert killed.returncode == -9
    assert "ready" in (folder.root / "stack.json").read_text()
    assert folder.info() == StackInfo(StackState.STOPPED, folder.info().pid)


def test_description_survives_the_round_trip(folder: DataFolder) -> None:
    info = StackInfo(StackState.READY, 7, {"nats": ProcessInfo("nats", 8, "127.0.0.1:9", "log", "crashed")})
    assert folder.acquire()
    folder.describe(info)
    assert DataFolder(folder.root).info() == info
    folder.release()


def test_failure_of_the_last_start_is_kept(folder: DataFolder) -> None:
    folder.describe(StackInfo(StackState.FAILED, 7, error="ingest ended"))
    assert folder.info().error == "ingest ended"
    assert folder.info().state is StackState.FAILED


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedPrecondition, match="cannot be used") as caught:
        DataFolder(tmp_path / "file" / "data").create()
    assert "--data" in caught.value.hint


def test_damaged_ports_are_forgotten(folder: DataFolder) -> None:
    folder.remember({"nats": 17000})
    assert folder.ports() == {"nats": 17000}
    (folder.root / "ports.json").write_text("[1")
    assert folder.ports() == {}
