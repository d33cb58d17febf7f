"""Private repositories over a real git http-backend with a password, and over a real sshd."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from codegraft.ingest.v1 import credential_pb2, source_pb2
from services.core import errors
from services.core.runtime import Runtime
from tests.repositories import commit, repository, run
from tests.servers import git_http
from tests.servers.git_http import GitServer
from tests.servers.ingest import KEY, PROJECT, world
from tests.servers.ssh import SshServer


async def test_a_token_opens_an_https_repository_and_is_seen_by_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = "s3cret-" + secrets.token_hex(12)
    repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    tls = git_http.certificate(tmp_path)
    with git_http.serving(tmp_path / "git", tls) as git_server:
        git_server.password, git_server.drip_seconds = ("robot", token), 0.3
        seen: set[str] = set()
        async with world(tmp_path, ingest_ca_file=tls[0]) as w:
            with pytest.raises(errors.SourceUnreachable) as refused:
                await w.add(git_server.url + "app/.git")
            assert "credential" in refused.value.hint
            made = await w.client.credentials.create_token(PROJECT, token, username="robot", credential_id="t")
            fetched = threading.Event()
            watching = asyncio.create_task(asyncio.to_thread(_watch_processes, token, seen, fetched))
            ready = await w.add(git_server.url + "app/.git", credential=made.name)
            fetched.set()
            await watching
            assert ready.file_count == 1
            shown = await w.client.credentials.get(made.name)
            stored = b"".join(entry.value or b"" for entry in await w.runtime.state("ingest").list())
            kept = b"".join(w.store.data.values())
    assert seen == {"git"}, "git ran, and no process had the token in its arguments or variables"
    assert token not in str(shown) and shown.HasField("use_time") and shown.username == "robot"
    assert token.encode() not in stored + kept
    out = capsys.readouterr()
    assert token not in out.out + out.err
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not [path for path in left if token.encode() in path.read_bytes()], "nothing of it stays on disk"


def _watch_processes(token: str, seen: set[str], fetched: threading.Event) -> None:
    """Looks at every process of the machine until then, which a test that fails before never says."""
    end = time.monotonic() + 60
    while not fetched.is_set() and time.monotonic() < end:
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes()
                everything = command + (folder / "environ").read_bytes()
                if token.encode() in everything:
                    seen.add("token")
                if command.startswith(b"git\0") and b"fetch" in command:
                    seen.add("git")
        time.sleep(0.01)


async def test_a_generated_key_opens_a_repository_over_ssh(tmp_path: Path, sshd: SshServer) -> None:
    repo = repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    async with world(tmp_path) as w:
        made = await w.client.credentials.generate_ssh_key(PROJECT, credential_id="deploy")
        assert made.public_key.startswith("ssh-ed25519 ") and made.fingerprint.startswith("SHA256:")
        with pytest.raises(errors.SourceUnreachable) as unknown:
            await w.add(sshd.url(repo), credential=made.name)
        assert "ssh-keyscan" in unknown.value.hint, "an unknown host is not believed"
        made.known_hosts.append(sshd.host_key)
        made = await w.client.credentials.update(made)
        with pytest.raises(errors.SourceUnreachable) as refused:
            await w.add(sshd.url(repo), credential=made.name)
        assert "credential" in refused.value.hint
        sshd.admit(made.public_key)
        ready = await w.add(sshd.url(repo), credential=made.name)
        assert (ready.file_count, ready.commit) == (1, run(repo, "rev-parse", "HEAD"))
        changed = commit(repo, {"b.py": "b = 2\n"})
        assert (await w.sync(ready.name)).commit == changed


async def test_a_host_key_is_pinned_only_when_asked_and_then_holds(tmp_path: Path, sshd: SshServer) -> None:
    repo = repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    key = ed25519.Ed25519PrivateKey.generate()
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.BestAvailableEncryption(b"pass")
    ).decode()
    sshd.admit(
        key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    )
    async with world(tmp_path) as w:
        secret = credential_pb2.CredentialSecret(
            ssh_private_key=credential_pb2.SshPrivateKey(private_key=text, passphrase="pass")
        )
        made = await w.client.credentials.create(PROJECT, secret, credential_id="k", pin_on_first_use=True)
        ready = await w.add(sshd.url(repo), credential=made.name)
        pinned = await w.client.credentials.get(made.name)
        assert [line.split()[:3] for line in pinned.known_hosts] == [sshd.host_key.split()[:3]]
        other = sshd.host_key.rsplit(" ", 1)[0] + " " + pinned.public_key.split()[1]
        pinned.known_hosts[:] = [other]
        await w.client.credentials.update(pinned)
        commit(repo, {"a.py": "a = 2\n"})
        with pytest.raises(errors.SourceUnreachable) as changed:
            await w.sync(ready.name)
        assert "ssh-keyscan" in changed.value.hint


async def test_credentials_that_cannot_be(tmp_path: Path) -> None:
    Secret, Key = credential_pb2.CredentialSecret, credential_pb2.SshPrivateKey
    locked = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.BestAvailableEncryption(b"pass")
    )
    async with world(tmp_path) as w:
        create = w.client.credentials.create
        cases: list[tuple[type[errors.CodegraftError], str, object]] = [
            (errors.InvalidCredential, "secret.kind", create(PROJECT, Secret())),
            (errors.InvalidCredential, "secret.https_token.token", w.client.credentials.create_token(PROJECT, "")),
            (errors.InvalidCredential, "secret.https_token.token", w.client.credentials.create_token(PROJECT, "a\nb")),
            (
                errors.InvalidCredential,
                "secret.ssh_private_key.private_key",
                create(PROJECT, Secret(ssh_private_key=Key(private_key="no key"))),
            ),
            (
                errors.InvalidCredential,
                "secret.ssh_private_key.passphrase",
                create(PROJECT, Secret(ssh_private_key=Key(private_key=locked.decode(), passphrase="wrong"))),
            ),
            (
                errors.InvalidCredential,
                "credential.known_hosts",
                w.client.credentials.generate_ssh_key(PROJECT, known_hosts=["host ssh-ed25519 AAAA"]),
            ),
            (errors.InvalidName, "credential_id", w.client.credentials.create_token(PROJECT, "x", credential_id="A b")),
            (errors.CredentialNotFound, "name", w.client.credentials.get(f"projects/{PROJECT}/credentials/none")),
            (
                errors.CredentialNotFound,
                "name",
                w.add("https://h/x", credential=f"projects/{PROJECT}/credentials/n"),
            ),
        ]
        for error, field, call in cases:
            with pytest.raises(error) as caught:
                await call  # type: ignore[misc]
            assert caught.value.field == field, (error, caught.value.field)
        token = await w.client.credentials.create_token(PROJECT, "x", credential_id="t", title="one")
        for url in ("ssh://git@host/x", "git@host:x"):
            with pytest.raises(errors.InvalidArgument, match="token opens no ssh"):
                await w.add(url, credential=token.name)
        with pytest.raises(errors.ResourceExists):
            await w.client.credentials.create_token(PROJECT, "x", credential_id="t")
        await w.client.projects.create("other")
        origin = source_pb2.GitSource(url="https://host/x", credential=token.name)
        with pytest.raises(errors.InvalidArgument, match="another project"):
            await w.client.sources.add("other", source_pb2.Source(git=origin))
        added = await w.client.sources.add(PROJECT, source_pb2.Source(git=origin))
        with pytest.raises(errors.CredentialInUse):
            await w.client.credentials.delete(token.name)
        await w.client.sources.remove(added.name)
        await w.client.credentials.delete(token.name)
        assert [one async for one in w.client.credentials.list(PROJECT)] == []


async def test_credentials_need_a_key_and_survive_its_exchange(tmp_path: Path, git_server: GitServer) -> None:
    repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    git_server.password = ("u", "p")
    runtime = Runtime.memory(tmp_path / "cache")
    here = {"ingest_allowed_urls": (git_server.url,)}
    async with world(tmp_path, runtime, **here, ingest_credential_keys=()) as w:
        with pytest.raises(errors.CredentialsDisabled) as caught:
            await w.client.credentials.create_token(PROJECT, "p", credential_id="t")
        assert "CODEGRAFT_INGEST_CREDENTIAL_KEYS" in caught.value.hint
    async with world(tmp_path, runtime, **here) as w:
        made = await w.client.credentials.create_token(PROJECT, "p", username="u", credential_id="t")
        ready = await w.add(git_server.url + "app/.git", credential=made.name)
    new = Fernet.generate_key().decode()
    async with world(tmp_path, runtime, **here, ingest_credential_keys=(new, KEY)) as w:
        assert (await w.sync(ready.name)).state == source_pb2.SOURCE_STATE_READY
    async with world(tmp_path, runtime, **here, ingest_credential_keys=(new,)) as w:
        with pytest.raises(errors.CredentialsDisabled):
            await w.sync(ready.name)
