"""Syncs: what changed and nothing else, on demand, on a schedule, and by whichever process is alive."""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from codegraft.ingest.v1 import snapshot_pb2, source_pb2
from services.core import errors
from services.core.runtime import Runtime
from services.core.state import mirror
from services.ingest import fetcher, files, workspace
from tests.repositories import commit, repository, run
from tests.servers.git_http import GitServer
from tests.servers.ingest import PROJECT, World, until, world


async def test_a_sync_reads_and_stores_only_what_changed(
    tmp_path: Path, git_server: GitServer, allowed: dict[str, object]
) -> None:
    files = {f"src/m{number}.py": f"x = {number}\n" * 50 for number in range(40)}
    repo = repository(tmp_path / "git" / "app", files)
    async with world(tmp_path, **allowed) as w:
        first = await w.add(git_server.url + "app/.git")
        assert first.stored_bytes == first.byte_count and not first.snapshot
        base = await w.client.snapshots.create(PROJECT)
        requests, objects = len(git_server.requests), contents(w)
        unmoved = await w.sync(first.name)
        assert (unmoved.generation, unmoved.content_digest, unmoved.snapshot) == (2, first.content_digest, "")
        assert len(git_server.requests) - requests <= 3, "one fetch"
        assert len(packs(tmp_path)) == 1, "that brought nothing"
        assert contents(w) == objects
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


def contents(w: World) -> set[str]:
    """Keys of what is stored, without the copies of records, which follow by themselves."""
    return {key for key in w.store.data if not key.startswith(mirror.ROOT)}


def packs(tmp_path: Path) -> list[Path]:
    """What kept repositories are made of, without the empty pack that git stores of a fetch that brings nothing."""
    found = (tmp_path / "cache" / "ingest" / "repositories").glob("*/objects/pack/*.pack")
    return [path for path in found if path.stat().st_size > 32]


@pytest.mark.parametrize("seed", range(3))
async def test_a_sync_of_what_changed_is_a_first_fetch_of_all(
    tmp_path: Path, git_server: GitServer, allowed: dict[str, object], seed: int
) -> None:
    """Every kind of entry turns into every other, and what is counted as left out follows."""
    rng = random.Random(seed)
    repo = repository(tmp_path / "git" / "app", {"always.py": "a = 1\n"})
    blobs = {
        "small": b"x = 1\n",
        "other": b"y = 2\n",
        "large": b"z" * 3000,
        "pointer": files.LFS_HEADER + b"oid sha256:0\n",
        "to": b"always.py",
    }
    ids = {name: _hash_object(repo, data) for name, data in blobs.items()}
    kinds = [("100644", name) for name in ("small", "other", "large", "pointer")]
    kinds += [("100755", "small"), ("120000", "to"), ("", "")]
    paths = ["a.py", "b.py", "lib/c.py", "lib/deep/d.py", "e", "e/f.py", "back\\slash.py", "lib/\u202e.py"]
    async with world(tmp_path, **allowed, ingest_max_file_bytes=2000) as w:
        followed = await w.add(git_server.url + "app/.git")
        for number in range(8):
            for path in rng.sample(paths, 4):
                run(
                    repo,
                    "rm",
                    "-r",
                    "-q",
                    "--cached",
                    "--ignore-unmatch",
                    "--",
                    path,
                    *([] if path != "e/f.py" else ["e"]),
                )
                mode, name = rng.choice(kinds)
                if mode and not (path == "e" and run(repo, "ls-files", "e/f.py")):
                    run(repo, "update-index", "--add", "--cacheinfo", f"{mode},{ids[name]},{path}")
            run(repo, "commit", "-q", "--allow-empty", "-m", str(number))
            followed = await w.sync(followed.name)
            fresh = await w.add(git_server.url + "app/.git")
            assert (followed.content_digest, dict(followed.skipped), followed.file_count, followed.byte_count) == (
                fresh.content_digest,
                dict(fresh.skipped),
                fresh.file_count,
                fresh.byte_count,
            ), run(repo, "ls-tree", "-r", "HEAD")
            assert followed.commit == fresh.commit == run(repo, "rev-parse", "HEAD")


def _hash_object(repo: Path, data: bytes) -> str:
    command = ["git", "-C", str(repo), "hash-object", "-w", "--stdin"]
    return subprocess.run(command, input=data, check=True, capture_output=True).stdout.decode().strip()


async def test_a_kept_repository_is_a_cache_and_nothing_else(
    tmp_path: Path, git_server: GitServer, allowed: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = repository(tmp_path / "git" / "app", {f"m{number}.py": f"{number}\n" * 20 for number in range(20)})
    kept = tmp_path / "cache" / "ingest" / "repositories"
    async with world(tmp_path, **allowed) as w:
        ready = await w.add(git_server.url + "app/.git")

        async def changed(text: str) -> source_pb2.Source:
            new = commit(repo, {"m3.py": text})
            synced = await w.sync(ready.name)
            assert (synced.commit, synced.file_count, synced.stored_bytes) == (new, 20, len(text))
            return synced

        await changed("one\n")
        assert len(packs(tmp_path)) == 2
        for damaged in packs(tmp_path):
            damaged.chmod(0o644)
            damaged.write_bytes(b"PACK" + bytes(60))
        await changed("damaged\n")
        shutil.rmtree(kept)
        await changed("gone\n")
        assert not packs(tmp_path), "one that was not fetched whole is not kept"
        ready = await w.add(git_server.url + "app/.git")
        run(repo, "reset", "-q", "--hard", "HEAD~2")
        await changed("history was rewritten\n")
        monkeypatch.setattr(workspace, "MAX_PACKS", 1)
        await changed("too many packs\n")
        assert not packs(tmp_path)
        requests = len(git_server.requests)
        await changed("begun anew\n")
        assert len(git_server.requests) - requests == 3 and len(packs(tmp_path)) == 1, "fetched whole"


async def test_a_kept_repository_survives_that_its_remote_is_away(
    tmp_path: Path, git_server: GitServer, allowed: dict[str, object]
) -> None:
    repo = repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    async with world(tmp_path, **allowed) as w:
        ready = await w.add(git_server.url + "app/.git")
        git_server.password = ("who", "knows")
        with pytest.raises(errors.SourceUnreachable):
            await w.sync(ready.name)
        git_server.password = None
        commit(repo, {"a.py": "a = 2\n"})
        requests = len(git_server.requests)
        assert (await w.sync(ready.name)).stored_bytes == 6
        assert len(git_server.requests) - requests == 3 and len(packs(tmp_path)) == 2


async def test_nothing_is_kept_of_a_removed_source(
    tmp_path: Path, git_server: GitServer, allowed: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetcher, "TIDY", 0.05)
    repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    async with world(tmp_path, **allowed) as w:
        ready = await w.add(git_server.url + "app/.git")
        other = await w.add(git_server.url + "app/.git")
        assert len(packs(tmp_path)) == 2
        await w.client.sources.remove(ready.name)
        await until(lambda: len(packs(tmp_path)) == 1)
        assert (await w.sync(other.name)).commit
        await asyncio.sleep(0.2)
        assert len(packs(tmp_path)) == 1, "the other's stays"


async def test_a_schedule_syncs_by_itself_and_stops_when_told(
    tmp_path: Path, git_server: GitServer, allowed: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    async with world(tmp_path, **allowed) as w:
        ready = await w.add(git_server.url + "app/.git")
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
        synced = await asyncio.wait_for(wait_for_commit(), 30)
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
    tmp_path: Path, git_server: GitServer, allowed: dict[str, object]
) -> None:
    repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    git_server.drip_seconds = 0.5
    runtime = Runtime.memory(tmp_path / "cache")
    async with world(tmp_path, runtime, **allowed) as one, world(tmp_path, runtime, **allowed):
        ready = await one.add(git_server.url + "app/.git")
        fetches = [path for _, path in git_server.requests if path.startswith("/app/.git/info/refs")]
        assert len(fetches) == 1, "one process fetched it"
    died = datetime.now(UTC) + timedelta(seconds=1.5)

    def held(record: source_pb2.Source) -> None:
        record.generation, record.state, record.fetcher = 2, source_pb2.SOURCE_STATE_FETCHING, "dead"
        record.lease_expire_time.FromDatetime(died)

    async with world(tmp_path, runtime, **allowed) as other:
        await other.ingest.tables.sources.mutate(ready.name, held)
        synced = await asyncio.wait_for(other.client.sources.wait(ready.name), 30)
        assert synced.fetched_generation == 2 and datetime.now(UTC) > died


@pytest.mark.parametrize("endless", [True, False], ids=["while it reads", "when it is done"])
async def test_a_process_that_lost_its_lease_stops_and_writes_nothing(
    tmp_path: Path, git_server: GitServer, allowed: dict[str, object], endless: bool
) -> None:
    repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    git_server.endless, git_server.hold = endless, threading.Event()
    async with world(tmp_path, **allowed, ingest_lease_seconds=2.0) as w:
        added = await w.client.sources.add(PROJECT, source_pb2.Source(git={"url": git_server.url + "app/.git"}))
        await until(lambda: git_server.requests)

        def lose(record: source_pb2.Source) -> None:
            record.fetcher = "another"
            record.lease_expire_time.FromDatetime(datetime.now(UTC) + timedelta(hours=1))

        await w.ingest.tables.sources.mutate(added.name, lose)
        git_server.hold.set()
        await until(lambda: not list((tmp_path / "cache" / "ingest").glob("fetch-*")), 15)
        await asyncio.sleep(0.2)
        source = await w.client.sources.get(added.name)
        assert (source.fetcher, source.state) == ("another", source_pb2.SOURCE_STATE_FETCHING)
        assert not source.fetched_generation and not source.commit and not source.HasField("failure")
    await until(lambda: not _children_named("git"))


async def test_a_removed_source_ends_its_fetch(
    tmp_path: Path, git_server: GitServer, allowed: dict[str, object]
) -> None:
    repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    git_server.endless = True
    async with world(tmp_path, **allowed) as w:
        added = await w.client.sources.add(PROJECT, source_pb2.Source(git={"url": git_server.url + "app/.git"}))
        await until(lambda: any("upload-pack" in path for _, path in git_server.requests))
        await w.client.sources.remove(added.name)
        await until(lambda: not list((tmp_path / "cache" / "ingest").glob("fetch-*")), 15)
    await until(lambda: not _children_named("git"))


def _children_named(name: str) -> list[int]:
    return [p.pid for p in psutil.Process().children(recursive=True) if p.name().startswith(name) and p.is_running()]


async def test_a_server_that_sends_without_end_is_cut_off(
    tmp_path: Path, git_server: GitServer, allowed: dict[str, object]
) -> None:
    repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    git_server.endless = True
    async with world(tmp_path, **allowed, ingest_max_seconds=3.0) as w:
        began = time.monotonic()
        with pytest.raises((errors.LimitExceeded, errors.SourceUnreachable)):
            await w.add(git_server.url + "app/.git")
        assert time.monotonic() - began < 15
    await until(lambda: not _children_named("git"))  # nor what it started


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
    tmp_path: Path, git_server: GitServer, allowed: dict[str, object]
) -> None:
    for team in ("one", "two"):
        repository(tmp_path / "git" / team / "app", {"a.py": f"{team} = 1\n"})
    async with world(tmp_path, **allowed) as w:
        names = [(await w.add(f"{git_server.url}{team}/app/.git")).name for team in ("one", "two")]
        assert len(set(names)) == 2
        assert await w.paths() == ["a.py", "a.py"]
