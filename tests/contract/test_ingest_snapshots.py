"""What becomes of the files: snapshots, masks, forgetting and garbage."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from codegraft.ingest.v1 import snapshot_pb2, source_pb2
from codegraft.scanner.v1.dataset_pb2 import DatasetManifest
from services.core import errors
from services.core.runtime import Runtime
from services.core.store import MemoryStore
from services.core.store import blobs as blob_keys
from services.ingest import snapshot
from services.ingest.assembly import Ingest
from services.ingest.config import IngestSettings
from services.ingest.garbage import Garbage
from services.ingest.snapshots import Snapshots
from tests.repositories import commit, repository
from tests.servers.git_http import GitServer
from tests.servers.ingest import PROJECT, World, world


def age(store: MemoryStore, days: float = 2) -> None:
    for key in store.modified:
        store.modified[key] -= timedelta(days=days)


async def collect(w: World, dry_run: bool = False) -> snapshot_pb2.CollectGarbageResponse:
    counts = [counts async for counts in w.client.snapshots.collect_garbage(dry_run=dry_run)]
    assert counts[-1].done
    return counts[-1]


async def test_garbage_is_what_nothing_refers_to(
    tmp_path: Path, git_server: GitServer, allowed: dict[str, object]
) -> None:
    repo = repository(tmp_path / "git" / "app", {"a.py": "a = 1\n", "b.py": "b = 1\n"})
    async with world(tmp_path, **allowed) as w:
        source = await w.add(git_server.url + "app/.git")
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
    tmp_path: Path, git_server: GitServer, allowed: dict[str, object]
) -> None:
    repository(tmp_path / "git" / "app", {"a.py": "a = 1\n"})
    runtime = Runtime.memory(tmp_path / "cache")
    async with world(tmp_path, runtime, **allowed) as w:
        await w.add(git_server.url + "app/.git")
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
