"""Where the client looks for the services."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.client import Addresses
from services.core import errors

NAMES = ["ingest", "scanner", "trainer", "inference"]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in NAMES:
        monkeypatch.delenv(f"CODEGRAFT_{name.upper()}_ADDRESS", raising=False)
    monkeypatch.delenv("CODEGRAFT_DATA", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))


def stack(folder: Path, port: int = 1000) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    processes = {name: {"address": f"127.0.0.1:{port + n}", "pid": 1} for n, name in enumerate(NAMES)}
    (folder / "stack.json").write_text(json.dumps({"processes": processes, "state": "running"}))


def test_the_environment_names_all_four(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stack(tmp_path / "share" / "codegraft")
    for name in NAMES:
        monkeypatch.setenv(f"CODEGRAFT_{name.upper()}_ADDRESS", f"{name}:1")
    assert Addresses.find() == Addresses("ingest:1", "scanner:1", "trainer:1", "inference:1")


def test_else_the_local_stack_in_its_default_folder(tmp_path: Path) -> None:
    stack(tmp_path / "share" / "codegraft")
    assert Addresses.find() == Addresses(*[f"127.0.0.1:{1000 + n}" for n in range(4)])


def test_else_in_the_folder_that_the_environment_or_the_caller_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stack(tmp_path / "one", 2000)
    stack(tmp_path / "two", 3000)
    monkeypatch.setenv("CODEGRAFT_DATA", str(tmp_path / "one"))
    assert Addresses.find().ingest == "127.0.0.1:2000"
    assert Addresses.find(tmp_path / "two").ingest == "127.0.0.1:3000"


def test_one_service_elsewhere_and_the_others_local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stack(tmp_path / "share" / "codegraft")
    monkeypatch.setenv("CODEGRAFT_INFERENCE_ADDRESS", "gpu:50054")
    found = Addresses.find()
    assert (found.ingest, found.inference) == ("127.0.0.1:1000", "gpu:50054")


@pytest.mark.parametrize("broken", [None, "", "no json", "[]", '{"processes": {}}', '{"processes": null}'])
def test_without_a_stack_the_error_says_what_to_do(tmp_path: Path, broken: str | None) -> None:
    if broken is not None:
        (tmp_path / "stack.json").write_text(broken)
    with pytest.raises(errors.Unavailable, match="no local stack runs") as caught:
        Addresses.find(tmp_path)
    assert "codegraft up" in caught.value.hint
    assert "CODEGRAFT_INGEST_ADDRESS" in caught.value.hint
