"""Ingest end to end over real git servers: private repositories, syncs, schedules, submodules, garbage."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import psutil
import pytest
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from codegraft.ingest.v1 import credential_pb2, snapshot_pb2, source_pb2
from codegraft.scanner.v1.dataset_pb2 import DatasetManifest
from services.client import Addresses, AsyncCodegraft
from services.core import errors
from services.core.rpc.interceptors import CallInterceptor
from services.core.runtime import Runtime
from services.core.store import MemoryStore
from services.core.store import blobs as blob_keys
from services.ingest import snapshot
from services.ingest.assembly import Ingest
from services.ingest.config import IngestSettings
from services.ingest.garbage import Garbage
from services.ingest.snapshots import Snapshots
from tests.servers import git_http, ssh
from tests.servers.git_http import GitServer
from tests.servers.ssh import SshServer

KEY = Fernet.generate_key().decode()
PROJECT = "demo"


def run(repo: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repo), "-c", "user.name=t", "-c", "user.email=t@example.com", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def repository(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True)
    run(folder, "init", "-q", "-b", "main")
    commit(folder, files)
    return folder


def commit(folder: Path, files: dict[str, str]) -> str:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    run(folder, "add", ".")
    run(folder, "commit", "-qm", "change")
    return run(folder, "rev-parse", "HEAD")


class World:
    """One ingest process over fakes of NATS and S3, and its client."""

    def __init__(self, runtime: Runtime, client: AsyncCodegraft, ingest: Ingest) -> None:
        self.runtime, self.client, self.ingest = runtime, client, ingest
        assert isinstance(runtime.store, MemoryStore)
        self.store = runtime.store

    async def add(self, url: str, **git: object) -> source_pb2.Source:
        origin = source_pb2.GitSource(url=url, **git)  # type: ignore[arg-type]
        added = await self.client.sources.add(PROJECT, source_pb2.Source(git=origin))
        return await self.client.sources.wait(added.name)

    async def sync(self, name: str) -> source_pb2.Source:
        await self.client.sources.sync(name)
        return await self.client.sources.wait(name)

    async def paths(self) -> list[str]:
        taken = await self.client.snapshots.create(PROJECT)
        return [file.path async for file in self.client.snapshots.files(taken.name)]


@contextlib.asynccontextmanager
async def world(tmp_path: Path, runtime: Runtime | None = None, **settings: object) -> AsyncIterator[World]:
    runtime = runtime or Runtime.memory(tmp_path / "cache")
    chosen: dict[str, object] = {"ingest_allowed_networks": ("127.0.0.0/8",), "ingest_credential_keys": (KEY,)}
    ingest = Ingest(
        runtime,
        IngestSettings(cache_dir=tmp_path / "cache", **(chosen | settings)),  # type: ignore[arg-type]
    )
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    for add, servicer, _ in ingest.services:
        add(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    fetching = asyncio.create_task(ingest.fetcher.run())
    address = f"127.0.0.1:{port}"
    try:
        async with AsyncCodegraft(Addresses(address, address, address, address)) as client:
            with contextlib.suppress(errors.ResourceExists):
                await client.projects.create(PROJECT)
            yield World(runtime, client, ingest)
    finally:
        fetching.cancel()
        await asyncio.gather(fetching, return_exceptions=True)
        await server.stop(None)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[GitServer]:
    with git_http.serving(tmp_path / "git") as running:
        yield running


@pytest.fixture
def allowed(server: GitServer) -> dict[str, object]:
    return {"ingest_allowed_urls": (server.url,)}


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[SshServer]:
    with ssh.serving(tmp_path / "sshd") as running:
        yield running


async def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


# --- private repositories ---------------------------------------------------------------------------------------


async def test_a_token_opens_an_https_repository_and_is_seen_by_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = "s3cret-" + secrets.token_hex(12)
    repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    tls = git_http.certificate(tmp_path)
    with git_http.serving(tmp_path / "git", tls) as server:
        server.password, server.drip_seconds = ("robot", token), 0.3
        seen: set[str] = set()
        async with world(tmp_path, ingest_ca_file=tls[0]) as w:
            with pytest.raises(errors.SourceUnreachable) as refused:
                await w.add(server.url + "app/.git")
            assert "credential" in refused.value.hint
            made = await w.client.credentials.create_token(PROJECT, token, username="robot", credential_id="t")
            watching = asyncio.create_task(asyncio.to_thread(_watch_processes, token, seen))
            ready = await w.add(server.url + "app/.git", credential=made.name)
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


def _watch_processes(token: str, seen: set[str], seconds: float = 3) -> None:
    """Looks at every process of the machine for a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
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


async def test_credentials_need_a_key_and_survive_its_exchange(tmp_path: Path, server: GitServer) -> None:
    repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    server.password = ("u", "p")
    runtime = Runtime.memory(tmp_path / "cache")
    here = {"ingest_allowed_urls": (server.url,)}
    async with world(tmp_path, runtime, **here, ingest_credential_keys=()) as w:
        with pytest.raises(errors.CredentialsDisabled) as caught:
            await w.client.credentials.create_token(PROJECT, "p", credential_id="t")
        assert "CODEGRAFT_INGEST_CREDENTIAL_KEYS" in caught.value.hint
    async with world(tmp_path, runtime, **here) as w:
        made = await w.client.credentials.create_token(PROJECT, "p", username="u", credential_id="t")
        ready = await w.add(server.url + "app/.git", credential=made.name)
    new = Fernet.generate_key().decode()
    async with world(tmp_path, runtime, **here, ingest_credential_keys=(new, KEY)) as w:
        assert (await w.sync(ready.name)).state == source_pb2.SOURCE_STATE_READY
    async with world(tmp_path, runtime, **here, ingest_credential_keys=(new,)) as w:
        with pytest.raises(errors.CredentialsDisabled):
            await w.sync(ready.name)


# --- syncs ------------------------------------------------------------------------------------------------------


async def test_a_sync_reads_and_stores_only_what_changed(
    tmp_path: Path, server: GitServer, allowed: dict[str, object]
) -> None:
    files = {f"src/m{number}.py": f"x = {number}\n" * 50 for number in range(40)}
    repo = repository(tmp_path / "git" / "app", files)
    async with world(tmp_path, **allowed) as w:
        first = await w.add(server.url + "app/.git")
        assert first.stored_bytes == first.byte_count and not first.snapshot
        base = await w.client.snapshots.create(PROJECT)
        requests, objects = len(server.requests), len(w.store.data)
        unmoved = await w.sync(first.name)
        assert (unmoved.generation, unmoved.content_digest, unmoved.snapshot) == (2, first.content_digest, "")
        assert len(server.requests) - requests <= 2, "one look at the refs"
        assert len(w.store.data) == objects
        (repo / "src" / "m1.py").unlink()
        new = commit(repo, {"src/m0.py": "changed\n", "new.py": files["src/m1.py"]})
        moved = await w.sync(first.name)
        assert (moved.commit, moved.file_count) == (new, 40)
        assert moved.stored_bytes == len("changed\n"), "a content that only moved costs nothing"
        assert moved.snapshot and moved.snapshot != base.name
        differences = [one async for one in w.client.snapshots.diff(base.name, moved.snapshot, page_size=2)]
        assert [(snapshot_pb2.FileChange.Name(one.change), one.before.path, one.after.path) for one in differences] == [
            ("FILE_CHANGE_ADDED", "", "new.py"),
            ("FILE_CHANGE_MODIFIED", "src/m0.py", "src/m0.py"),
            ("FILE_CHANGE_REMOVED", "src/m1.py", ""),
        ]
        commit(repo, files | {"new.py": ""})
        run(repo, "rm", "-q", "new.py")
        run(repo, "commit", "-qm", "back")
        again = (await w.sync(first.name)).snapshot
        assert [one async for one in w.client.snapshots.diff(base.name, again)] == []


async def test_a_schedule_syncs_by_itself_and_stops_when_told(
    tmp_path: Path, server: GitServer, allowed: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    async with world(tmp_path, **allowed) as w:
        ready = await w.add(server.url + "app/.git")
        ready.ClearField("git")
        ready.sync_interval_seconds = 10
        await w.client.sources.update(ready)
        wanted = commit(repo, {"a.py": "a = 2\n"})

        async def wait_for_commit() -> source_pb2.Source:
            async for source in w.client.sources.watch(ready.name):
                if source.commit == wanted and source.snapshot:
                    return source
            raise AssertionError

        # The clock is moved, not waited for: the last attempt was a while ago.
        def age(record: source_pb2.Source) -> None:
            record.attempt_time.FromDatetime(datetime.now(UTC) - timedelta(seconds=11))

        await w.ingest.tables.sources.mutate(ready.name, age)
        synced = await asyncio.wait_for(wait_for_commit(), 15)
        assert synced.generation == 2
        synced.sync_interval_seconds = 0
        synced.ClearField("git")
        await w.client.sources.update(synced)
        await w.ingest.tables.sources.mutate(ready.name, age)
        await asyncio.sleep(2.5)
        assert (await w.client.sources.get(ready.name)).generation == 2
        with pytest.raises(errors.InvalidArgument, match="sync_interval"):
            synced.sync_interval_seconds = 3
            await w.client.sources.update(synced)
        added = await w.client.sources.add_file(PROJECT, b"a = 1\n", path="b.py")
        uploaded = await w.client.sources.wait(added.name)
        uploaded.ClearField("file")
        uploaded.sync_interval_seconds = 60
        with pytest.raises(errors.InvalidArgument, match="uploaded"):
            await w.client.sources.update(uploaded)


async def test_two_processes_share_the_work_and_one_takes_over_from_a_dead_one(
    tmp_path: Path, server: GitServer, allowed: dict[str, object]
) -> None:
    repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    server.drip_seconds = 0.5
    runtime = Runtime.memory(tmp_path / "cache")
    settings = allowed | {"ingest_lease_seconds": 2.0}
    async with world(tmp_path, runtime, **settings) as one, world(tmp_path, runtime, **settings):
        ready = await one.add(server.url + "app/.git")
        fetches = [path for _, path in server.requests if path.startswith("/app/.git/info/refs")]
        assert len(fetches) == 1, "one process fetched it"
    died = datetime.now(UTC) + timedelta(seconds=1.5)

    def held(record: source_pb2.Source) -> None:
        record.generation, record.state, record.fetcher = 2, source_pb2.SOURCE_STATE_FETCHING, "dead"
        record.lease_expire_time.FromDatetime(died)

    async with world(tmp_path, runtime, **settings) as other:
        await other.ingest.tables.sources.mutate(ready.name, held)
        synced = await asyncio.wait_for(other.client.sources.wait(ready.name), 15)
        assert synced.fetched_generation == 2 and datetime.now(UTC) > died


async def test_a_removed_source_ends_its_fetch(tmp_path: Path, server: GitServer, allowed: dict[str, object]) -> None:
    repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    server.endless = True
    async with world(tmp_path, **allowed) as w:
        added = await w.client.sources.add(PROJECT, source_pb2.Source(git={"url": server.url + "app/.git"}))
        await until(lambda: any("upload-pack" in path for _, path in server.requests))
        await w.client.sources.remove(added.name)
        await until(lambda: not list((tmp_path / "cache" / "ingest").glob("fetch-*")), 15)
    assert not _children_named("git")


def _children_named(name: str) -> list[int]:
    return [p.pid for p in psutil.Process().children(recursive=True) if p.name().startswith(name) and p.is_running()]


async def test_a_server_that_sends_without_end_is_cut_off(
    tmp_path: Path, server: GitServer, allowed: dict[str, object]
) -> None:
    repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    server.endless = True
    async with world(tmp_path, **allowed, ingest_max_seconds=3.0) as w:
        began = time.monotonic()
        with pytest.raises((errors.LimitExceeded, errors.SourceUnreachable)):
            await w.add(server.url + "app/.git")
        assert time.monotonic() - began < 15
    assert not _children_named("git"), "git and what it started are gone"


async def test_a_new_upload_of_the_same_source_stores_only_what_differs(tmp_path: Path) -> None:
    repo = repository(tmp_path / "app", {f"m{number}.py": f"x = {number}\n" * 30 for number in range(20)})
    run(repo, "bundle", "create", "-q", str(tmp_path / "one"), "--all")
    async with world(tmp_path) as w:
        added = await w.client.sources.add_bundle(PROJECT, tmp_path / "one")
        assert added.name.endswith("/sources/one"), "named after the file"
        ready = await w.client.sources.wait(added.name)
        commit(repo, {"m3.py": "three\n"})
        run(repo, "bundle", "create", "-q", str(tmp_path / "two"), "--all")
        ready.bundle.upload = (await w.client.sources.upload(PROJECT, tmp_path / "two")).name
        await w.client.sources.update(ready)
        changed = await w.client.sources.wait(added.name)
        assert (changed.generation, changed.stored_bytes, changed.file_count) == (2, len("three\n"), 20)
        assert changed.snapshot
        with pytest.raises(errors.InvalidArgument, match="cannot become"):
            await w.client.sources.update(source_pb2.Source(name=added.name, git={"url": "https://host/x"}))


async def test_repositories_of_one_name_do_not_collide(
    tmp_path: Path, server: GitServer, allowed: dict[str, object]
) -> None:
    for team in ("one", "two"):
        repository(tmp_path / "git" / team / "app", {"a.py": f"{team} = 1\n"})
    async with world(tmp_path, **allowed) as w:
        names = [(await w.add(f"{server.url}{team}/app/.git")).name for team in ("one", "two")]
        assert len(set(names)) == 2
        assert await w.paths() == ["a.py", "a.py"]


# --- submodules, LFS --------------------------------------------------------------------------------------------


async def test_submodules_come_only_when_asked(tmp_path: Path, server: GitServer, allowed: dict[str, object]) -> None:
    root = tmp_path / "git"
    inner = repository(root / "inner", {"i.py": "i = 1\n"})
    library = repository(root / "library", {"l.py": "l = 1\n"})
    run(library, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(inner), "deep")
    app = repository(root / "app", {"a.py": "a = 1\n", "model.bin": "version https://git-lfs.github.com/spec/v1\n"})
    run(app, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(library), "vendor/library")
    for repo, name, relative in ((library, "deep", "../../inner/.git"), (app, "vendor/library", "../../library/.git")):
        run(repo, "config", "-f", ".gitmodules", f"submodule.{name}.url", relative)
        run(repo, "add", ".")
        run(repo, "commit", "-qm", "submodule")
    run(app / "vendor/library", "pull", "-q", str(library), "main")
    run(app, "add", ".")
    run(app, "commit", "-qm", "newer")
    async with world(tmp_path, **allowed) as w:
        without = await w.add(server.url + "app/.git")
        assert dict(without.skipped) == {"submodule": 1, "lfs-pointer": 1}
        assert await w.paths() == [".gitmodules", "a.py"]
        await w.client.sources.remove(without.name)
        with_them = await w.add(server.url + "app/.git", submodules=True)
        assert dict(with_them.skipped) == {"lfs-pointer": 1}
        assert await w.paths() == [
            ".gitmodules", "a.py", "vendor/library/.gitmodules", "vendor/library/deep/i.py", "vendor/library/l.py"
        ]  # fmt: skip
        await w.client.sources.remove(with_them.name)
        below = await w.add(server.url + "app/.git", submodules=True, subpath="vendor")
        assert await w.paths() == ["library/.gitmodules", "library/deep/i.py", "library/l.py"], below


@pytest.mark.parametrize(
    "url", ["file:///etc", "ext::sh -c touch% x", "http://127.0.0.1:1/x", "-oProxyCommand=x", "https://user:pw@host/x"]
)
async def test_a_submodule_with_a_forbidden_url_fails_the_fetch(
    tmp_path: Path, server: GitServer, allowed: dict[str, object], url: str
) -> None:
    app = repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    head = run(app, "rev-parse", "HEAD")
    (app / ".gitmodules").write_text(f'[submodule "x"]\n\tpath = x\n\turl = {url}\n')
    run(app, "add", ".gitmodules")
    run(app, "update-index", "--add", "--cacheinfo", f"160000,{head},x")
    run(app, "commit", "-qm", "evil")
    async with world(tmp_path, **allowed) as w:
        # git's own check refuses some of these as they come in.
        with pytest.raises((errors.InvalidGitUrl, errors.SourceUnreachable), match=r"submodule"):
            await w.add(server.url + "app/.git", submodules=True)


async def test_a_submodule_path_with_a_carriage_return_does_nothing(
    tmp_path: Path, server: GitServer, allowed: dict[str, object]
) -> None:
    """CVE-2025-48384: the CR was lost on writing the configuration, and the checkout went through a symlink."""
    app = repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    head = run(app, "rev-parse", "HEAD")
    (app / ".gitmodules").write_text('[submodule "x"]\n\tpath = "x\r"\n\turl = ../../app/.git\n')
    (app / "x").symlink_to(".git/hooks")
    run(app, "add", ".gitmodules", "x")
    run(app, "update-index", "--add", "--cacheinfo", f"160000,{head},x\r")
    run(app, "commit", "-qm", "evil")
    async with world(tmp_path, **allowed) as w:
        ready = await w.add(server.url + "app/.git", submodules=True)
        assert dict(ready.skipped) == {"submodule": 1, "symlink": 1}
        assert await w.paths() == [".gitmodules", "a.py"]


# --- hostile repositories and addresses -------------------------------------------------------------------------


async def test_hostile_trees_are_left_out_and_bounded(
    tmp_path: Path, server: GitServer, allowed: dict[str, object]
) -> None:
    app = repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    blob = run(app, "rev-parse", "HEAD:a.py")

    def tree(*entries: tuple[str, str, bytes]) -> str:
        data = b"".join(f"{mode} ".encode() + name + b"\0" + bytes.fromhex(oid) for mode, oid, name in entries)
        command = ["git", "-C", str(app), "hash-object", "-w", "-t", "tree", "--literally", "--stdin"]
        return subprocess.run(command, input=data, check=True, capture_output=True).stdout.decode().strip()

    def point_to(tree_id: str, ref: str) -> None:
        run(app, "update-ref", f"refs/heads/{ref}", run(app, "commit-tree", "-m", "evil", tree_id))

    point_to(
        tree(("100644", blob, b"bidi\xe2\x80\xae.py"), ("100644", blob, b"caf\xe9.py"), ("100644", blob, b"ok.py")),
        "odd",
    )
    point_to(tree(("100644", blob, b"..")), "climbs")
    point_to(tree(("100644", blob, b".git")), "dotgit")
    bomb = tree(*[("100644", blob, f"f{n}".encode()) for n in range(10)])
    for _ in range(8):
        bomb = tree(*[("40000", bomb, f"d{n}".encode()) for n in range(10)])
    point_to(bomb, "bomb")
    async with world(tmp_path, **allowed, ingest_max_files=5000) as w:
        odd = await w.add(server.url + "app/.git", ref="odd")
        assert (dict(odd.skipped), odd.file_count) == ({"unsafe-path": 2}, 1)
        for ref in ("climbs", "dotgit"):  # git's own check refuses such trees as they come in
            with pytest.raises((errors.SourceUnreachable, errors.EmptySource)):
                await w.add(server.url + "app/.git", ref=ref)
        with pytest.raises(errors.LimitExceeded, match="files"):
            await w.add(server.url + "app/.git", ref="bomb")
        assert (await w.sync(odd.name)).state == source_pb2.SOURCE_STATE_READY, "the service keeps serving"


async def test_alternates_over_the_old_protocol_lead_nowhere(
    tmp_path: Path, server: GitServer, allowed: dict[str, object]
) -> None:
    app = repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    run(app, "update-server-info")
    with git_http.serving(tmp_path / "git") as inside:
        (app / ".git/objects/info").mkdir(exist_ok=True)
        (app / ".git/objects/info/http-alternates").write_text(f"{inside.url}app/.git/objects/\n")
        (app / ".git/objects/info/alternates").write_text("/etc\n")
        blob = run(app, "hash-object", "a.py")
        (app / ".git/objects" / blob[:2] / blob[2:]).unlink()
        server.dumb = True
        async with world(tmp_path, **allowed) as w:
            with pytest.raises(errors.CodegraftError):
                await w.add(server.url + "app/.git")
        assert inside.requests == []


@pytest.mark.parametrize("kind", ["git", "url"])
async def test_addresses_inside_the_house_are_refused(tmp_path: Path, kind: str) -> None:
    hosts = [
        "127.0.0.1", "localhost", "169.254.169.254", "10.0.0.1", "192.168.1.1", "172.16.0.1", "[::1]", "0.0.0.0",
        "[::ffff:127.0.0.1]", "100.64.0.1", "[fe80::1]", "[64:ff9b::7f00:1]", "2130706433", "224.0.0.1",
    ]  # fmt: skip
    async with world(tmp_path, ingest_allowed_networks=(), ingest_allowed_urls=()) as w:
        for host in hosts:
            url = f"https://{host}/x"
            origin = {"git": {"url": url}} if kind == "git" else {"url": {"url": url}}
            added = await w.client.sources.add(PROJECT, source_pb2.Source(**origin))  # type: ignore[arg-type]
            with pytest.raises((errors.InvalidArgument, errors.SourceUnreachable)) as caught:
                await w.client.sources.wait(added.name)
            assert "public" in caught.value.message or "resolved" in caught.value.message, (host, caught.value.message)


async def test_a_redirect_into_the_house_is_refused(tmp_path: Path, server: GitServer) -> None:
    (tmp_path / "git").mkdir()
    (tmp_path / "git" / "secret.py").write_text("secret = 1\n")
    repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    with git_http.serving(tmp_path / "git") as inside:
        inside.dumb = True
        server.redirect = inside.url.rstrip("/")
        only = {"ingest_allowed_urls": (server.url,), "ingest_allowed_networks": ()}
        async with world(tmp_path, **only) as w:
            added = await w.client.sources.add(PROJECT, source_pb2.Source(url={"url": server.url + "secret.py"}))
            with pytest.raises(errors.InvalidArgument):
                await w.client.sources.wait(added.name)
            with pytest.raises(errors.SourceUnreachable) as caught:
                await w.add(server.url + "app/.git")
            assert "moved" in caught.value.hint
        assert inside.requests == []


async def test_urls_are_fetched_with_redirects_and_digest(tmp_path: Path, server: GitServer) -> None:
    (tmp_path / "git").mkdir()
    (tmp_path / "git" / "one.py").write_text("one = 1\n")
    with git_http.serving(tmp_path / "git") as target:
        target.dumb = True
        server.redirect = target.url.rstrip("/")
        async with world(tmp_path, ingest_allowed_urls=(server.url, target.url)) as w:
            added = await w.client.sources.add(PROJECT, source_pb2.Source(url={"url": server.url + "one.py?x=1"}))
            assert added.name.endswith("/one-py")
            assert (await w.client.sources.wait(added.name)).file_count == 1
            wrong = await w.client.sources.add(
                PROJECT, source_pb2.Source(url={"url": server.url + "one.py", "sha256": "0" * 64})
            )
            with pytest.raises(errors.UploadMismatch):
                await w.client.sources.wait(wrong.name)
        server.redirect = server.url.rstrip("/")
        async with world(tmp_path, ingest_allowed_urls=(server.url,)) as w:
            loop = await w.client.sources.add(PROJECT, source_pb2.Source(url={"url": server.url + "loop.py"}))
            with pytest.raises(errors.SourceUnreachable, match="too often"):
                await w.client.sources.wait(loop.name)


# --- what becomes of it -----------------------------------------------------------------------------------------


def age(store: MemoryStore, days: float = 2) -> None:
    for key in store.modified:
        store.modified[key] -= timedelta(days=days)


async def collect(w: World, dry_run: bool = False) -> snapshot_pb2.CollectGarbageResponse:
    counts = [counts async for counts in w.client.snapshots.collect_garbage(dry_run=dry_run)]
    assert counts[-1].done
    return counts[-1]


async def test_garbage_is_what_nothing_refers_to(tmp_path: Path, server: GitServer, allowed: dict[str, object]) -> None:
    repo = repository(tmp_path / "git" / "app", {"a.py": "a = 1\n", "b.py": "b = 1\n"})
    async with world(tmp_path, **allowed) as w:
        source = await w.add(server.url + "app/.git")
        first = await w.client.snapshots.create(PROJECT)
        held = await w.runtime.blobs.put(b"rows of a dataset")
        manifest = DatasetManifest(name=f"projects/{PROJECT}/datasets/d", snapshot=first.name)
        await w.runtime.artifacts.commit(manifest.name, manifest, {"train.parquet": b"rows of a dataset"})
        commit(repo, {"a.py": "a = 2\n"})
        second = (await w.sync(source.name)).snapshot
        orphan = await w.runtime.blobs.put(b"nobody's")
        await w.client.sources.upload(PROJECT, b"never used")
        assert (await collect(w)).removed == 0, "everything is young"
        age(w.store)
        would = await collect(w, dry_run=True)
        assert w.store.data.keys() >= {blob_keys.key(orphan)}
        done = await collect(w)
        assert (done.removed, done.removed_bytes) == (would.removed, would.removed_bytes)
        assert done.removed >= 2 and blob_keys.key(orphan) not in w.store.data and blob_keys.key(held) in w.store.data
        for name in (first.name, second):
            table = await Snapshots(w.runtime, w.ingest.tables).table(name)
            packs = snapshot.packs(table)
            assert {blob_keys.key(pack) for pack in packs} <= w.store.data.keys()
        with pytest.raises(errors.SnapshotInUse):
            await w.client.snapshots.delete(first.name)
        await w.client.snapshots.delete(second)
        with pytest.raises(errors.SnapshotNotFound):
            await w.client.snapshots.get(second)
        await collect(w)
        assert {blob_keys.key(pack) for pack in packs} <= w.store.data.keys(), "the source still has those contents"
        forgotten = await w.client.sources.forget(source.name)
        assert list(forgotten.snapshots) == [first.name] and list(forgotten.datasets) == [manifest.name]
        await collect(w)
        left = b"".join(w.store.data.values())
        assert b"a = 1" not in left and b"b = 1" not in left, "its contents are gone"
        assert blob_keys.key(held) in w.store.data
        with pytest.raises(errors.InvalidArgument, match="min_age"):
            await anext(aiter(w.client.snapshots.collect_garbage(min_age_seconds=5)))


async def test_an_old_blob_that_is_stored_again_outlives_the_collection(tmp_path: Path) -> None:
    runtime = Runtime.memory(tmp_path / "cache")
    async with world(tmp_path, runtime) as w:
        sha256 = await runtime.blobs.put(b"x = 1\n")
        age(w.store)
        garbage = Garbage(runtime, w.ingest.tables, dry_run=False).collect()
        assert await runtime.blobs.put(b"x = 1\n") == sha256, "a writer relies on it while it is collected"
        async for _ in garbage:
            pass
        assert await runtime.blobs.get(sha256) == b"x = 1\n"


async def test_a_lost_state_does_not_empty_the_store(
    tmp_path: Path, server: GitServer, allowed: dict[str, object]
) -> None:
    repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    runtime = Runtime.memory(tmp_path / "cache")
    async with world(tmp_path, runtime, **allowed) as w:
        await w.add(server.url + "app/.git")
        await w.client.snapshots.create(PROJECT)
        age(w.store)
    fresh = Runtime.memory(tmp_path / "other")
    fresh.store, fresh.blobs, fresh.artifacts = runtime.store, runtime.blobs, runtime.artifacts
    garbage = Garbage(fresh, Ingest(fresh, IngestSettings(cache_dir=tmp_path)).tables, dry_run=False)
    with pytest.raises(errors.FailedPrecondition, match="lost"):
        async for _ in garbage.collect():
            pass


async def test_masks_of_project_and_source_are_in_the_snapshot(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.client.projects.create("masked", exclude=["*.min.js"], include=["*.py"])
        for name, include in (("a", []), ("b", ["*.js"])):
            upload = await w.client.sources.upload("masked", f"x = '{name}'\n".encode())
            origin = source_pb2.FileSource(upload=upload.name, path="x.py")
            added = await w.client.sources.add(
                "masked", source_pb2.Source(file=origin, include=include, exclude=["docs/**"]), source_id=name
            )
            await w.client.sources.wait(added.name)
        taken = await w.client.snapshots.create("masked")
        assert [(list(s.exclude), list(s.include)) for s in taken.sources] == [
            (["*.min.js", "docs/**"], ["*.py"]),
            (["*.min.js", "docs/**"], ["*.js"]),
        ]
