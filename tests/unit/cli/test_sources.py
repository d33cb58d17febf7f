"""Credentials and snapshots on the command line."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codegraft.ingest.v1 import credential_pb2, snapshot_pb2

Codegraft = Callable[..., Any]
PUBLIC = "ssh-ed25519 AAAAC3Nz codegraft"


@pytest.fixture
def credential(fake: Any) -> credential_pb2.Credential:
    stored = credential_pb2.Credential(
        name="projects/acme/credentials/deploy",
        kind=credential_pb2.CREDENTIAL_KIND_SSH_KEY,
        public_key=PUBLIC,
        fingerprint="SHA256:abc",
        known_hosts=["git.corp.example ssh-ed25519 AAAA"],
    )
    fake.answers.update(
        CreateCredential=credential_pb2.CreateCredentialResponse(credential=stored),
        GetCredential=credential_pb2.GetCredentialResponse(credential=stored),
        UpdateCredential=credential_pb2.UpdateCredentialResponse(credential=stored),
        ListCredentials=credential_pb2.ListCredentialsResponse(credentials=[stored]),
        DeleteCredential=credential_pb2.DeleteCredentialResponse(),
    )
    return stored


def test_a_key_is_made_there_and_its_public_half_printed(
    fake: Any, credential: Any, codegraft: Codegraft, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("git.corp.example ssh-ed25519 AAAA\n")
    done = codegraft("credential", "add-key", "deploy", "-p", "acme", "--known-hosts", str(hosts))
    assert (done.code, done.out.strip()) == (0, PUBLIC), "only the public half is on stdout, so that it can be piped"
    sent = fake.last("CreateCredential")
    assert sent.secret.WhichOneof("kind") == "generate_ssh_key"
    assert list(sent.credential.known_hosts) == ["git.corp.example ssh-ed25519 AAAA"]
    assert not sent.credential.pin_on_first_use


def test_a_token_comes_from_a_file_and_is_not_echoed(
    fake: Any, credential: Any, codegraft: Codegraft, tmp_path: Path
) -> None:
    secret = tmp_path / "token"
    secret.write_text("s3cret-token\n")
    done = codegraft("credential", "add-token", "hub", "-p", "acme", "--token-file", str(secret), "--username", "bot")
    assert done.code == 0
    assert fake.last("CreateCredential").secret.https_token.token == "s3cret-token"
    assert "s3cret" not in done.out + done.err
    missing = codegraft("credential", "add-token", "hub", "-p", "acme", "--token-file", str(tmp_path / "no"))
    assert missing.code == 2 and "cannot be read" in missing.err


def test_credentials_are_listed_shown_changed_and_deleted(
    fake: Any, credential: Any, codegraft: Codegraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "SHA256:abc" in codegraft("credential", "list", "-p", "acme").out
    assert PUBLIC in codegraft("credential", "show", "deploy", "-p", "acme").out
    monkeypatch.setattr("sys.stdin", io.StringIO("other.example ssh-ed25519 BBBB\n"))
    assert codegraft("credential", "hosts", "deploy", "-", "-p", "acme").code == 0
    assert list(fake.last("UpdateCredential").credential.known_hosts) == ["other.example ssh-ed25519 BBBB"]
    assert codegraft("credential", "delete", "deploy", "-p", "acme").code == 0
    assert fake.last("DeleteCredential").name == credential.name


def test_a_new_key_for_the_service_is_32_random_bytes(codegraft: Codegraft) -> None:
    first, second = (codegraft("credential", "new-key").out.strip() for _ in range(2))
    assert first != second
    assert len(base64.urlsafe_b64decode(first)) == 32


def test_a_difference_is_told_file_by_file(fake: Any, codegraft: Codegraft) -> None:
    def file(path: str, size: int) -> snapshot_pb2.SnapshotFile:
        return snapshot_pb2.SnapshotFile(source="projects/acme/sources/app", path=path, size=size)

    changes = [
        snapshot_pb2.SnapshotDifference(change=snapshot_pb2.FILE_CHANGE_ADDED, after=file("new.py", 10)),
        snapshot_pb2.SnapshotDifference(change=snapshot_pb2.FILE_CHANGE_REMOVED, before=file("old.py", 7)),
    ]
    fake.answers["DiffSnapshots"] = snapshot_pb2.DiffSnapshotsResponse(differences=changes)
    done = codegraft("snapshot", "diff", "a" * 64, "-p", "acme")
    assert done.code == 0
    added, removed = done.out.splitlines()[-2:]
    assert added.split() == ["added", "app", "new.py", "10"]
    assert removed.split() == ["removed", "app", "old.py", "-7"]
    fake.answers["DiffSnapshots"] = snapshot_pb2.DiffSnapshotsResponse()
    assert "nothing changed" in codegraft("snapshot", "diff", "a" * 64, "-p", "acme").err


def test_garbage_is_only_counted_when_asked(fake: Any, codegraft: Codegraft) -> None:
    last = snapshot_pb2.CollectGarbageResponse(examined=5, removed=2, removed_bytes=30, kept=3, done=True)
    fake.answers["CollectGarbage"] = [snapshot_pb2.CollectGarbageResponse(examined=1), last]
    done = codegraft("snapshot", "gc", "--dry-run")
    assert (done.code, fake.last("CollectGarbage").dry_run) == (0, True)
    assert "2 objects (30 bytes) would be removed" in done.err
    assert json.loads(codegraft("snapshot", "gc", "--json").out)["removed"] in (2, "2")
    assert not fake.last("CollectGarbage").dry_run
