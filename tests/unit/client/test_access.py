"""Which key and which certificates a client takes, and to whom it never gives the local stack's key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.client import Access, Addresses, Codegraft
from services.core.rpc.tls import ClientFiles

LOCAL = Addresses(*[f"127.0.0.1:{1000 + number}" for number in range(4)])
FAR = Addresses("ingest:1", "scanner:1", "trainer:1", "inference:1")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("API_KEY", "TLS_CA_FILE", "TLS_CERT_FILE", "TLS_KEY_FILE", "DATA"):
        monkeypatch.delenv(f"CODEGRAFT_{name}", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "share" / "codegraft"
    folder.mkdir(parents=True)
    names = ("ingest", "scanner", "trainer", "inference")
    processes = {name: {"address": getattr(LOCAL, name)} for name in names}
    (folder / "stack.json").write_text(json.dumps({"processes": processes}))
    (folder / "credentials.json").write_text(json.dumps({"api_key": "the stack's"}))
    return folder


def test_the_stacks_key_goes_to_the_stack_alone(folder: Path) -> None:
    assert Access.find(LOCAL).key == "the stack's"
    assert Access.find(FAR).key == ""
    assert Access.find(Addresses(LOCAL.ingest, LOCAL.scanner, LOCAL.trainer, FAR.inference)).key == ""
    assert Access.find(FAR, folder).key == ""
    assert "stack's" not in repr(Access.find(LOCAL))


def test_the_environments_key_counts_unless_a_folder_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODEGRAFT_API_KEY", "mine")
    assert Access.find(LOCAL).key == Access.find(FAR).key == "mine"
    assert Access.find(LOCAL, folder).key == "the stack's"


@pytest.mark.parametrize("content", ["", "[]", "{}", "no json"])
def test_a_stack_of_an_older_version_has_no_key(folder: Path, content: str) -> None:
    (folder / "credentials.json").write_text(content)
    assert Access.find(LOCAL).key == ""


def test_certificates_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CODEGRAFT_TLS_CERT_FILE", "cert")  # a service's own: no reason to call others with TLS
    assert Access.find(FAR).tls is None
    monkeypatch.setenv("CODEGRAFT_TLS_CA_FILE", str(tmp_path / "ca"))
    assert Access.find(FAR).tls == ClientFiles(tmp_path / "ca", Path("cert"))


def test_the_stack_is_called_without_tls(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODEGRAFT_TLS_CA_FILE", "ca")
    assert Access.find(LOCAL).tls is None
    assert Access.find(FAR).tls is not None


def test_a_client_with_another_key_shares_the_connections(folder: Path) -> None:
    with Codegraft.local() as client:
        other = client.with_key("theirs").with_timeout(5)
        assert other._channels is client._channels
        assert [each.keys._caller._metadata() for each in (client, other)] == [
            (("authorization", f"Bearer {key}"),) for key in ("the stack's", "theirs")
        ]
