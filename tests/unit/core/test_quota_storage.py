"""What is stored, by what it is: everything once, and what is gone not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from codegraft.access.v1.quota_pb2 import ProjectStorage, StorageUsage, StoredPlaces
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from services.core.auth.keyring import BUCKET
from services.core.errors import QuotaExceeded
from services.core.quota.limits import Defaults
from services.core.quota.storage import Stored, kind_of, size_of
from services.core.runtime import Runtime

P = "projects/p"
ARTIFACTS = {
    f"{P}/snapshots/s": ("snapshots", 1),
    f"{P}/datasets/d": ("datasets", 20),
    f"{P}/scans/s": ("datasets", 300),
    f"{P}/runs/r/checkpoints/8": ("adapters", 4000),
    f"{P}/runs/r/states/8": ("training_states", 50000),
    "projects/p-2/datasets/d": ("datasets", 600000),
}


async def filled(**quota: int) -> Runtime:
    runtime = Runtime.memory(quota_project=Defaults(**quota))
    for name, (_, size) in ARTIFACTS.items():
        await runtime.artifacts.commit(name, AdapterManifest(name=name), {"one": b"x" * size})
    await runtime.store.put(f"{P}/scans/s/parts/1", b"no artifact")
    return runtime


async def records(owner: str, there: StoredPlaces) -> Mapping[str, int]:
    return {f"{owner}/uploads/u": 7, f"{owner}/sources/a": 8, f"{owner}/sources/b": 9}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (kind, _) in ARTIFACTS.items()])
def test_a_thing_is_of_one_kind(name: str, kind: str) -> None:
    assert kind_of(name) == kind


async def test_kinds_add_up_to_what_is_used() -> None:
    runtime = await filled()
    stored = Stored(runtime.store, records)
    usage = await stored.usage(P)
    assert usage == StorageUsage(uploads=7, sources=17, snapshots=1, datasets=320, adapters=4000, training_states=50000)
    assert sum((await stored.used(P, StoredPlaces())).values()) == sum(size for _, size in usage.ListFields())
    assert await stored.usage("keys/k") == StorageUsage(uploads=7, sources=17), "artifacts are nobody's own"
    await runtime.store.delete(f"{P}/runs/r/states/8/manifest.json")
    assert (await stored.usage(P)).training_states == 0


async def test_the_other_services_have_ingests_records_as_sums() -> None:
    runtime = await filled(storage_bytes=60_000)
    assert await runtime.storage.used(P) == 54321
    said = StoredPlaces(recorded=ProjectStorage(uploads=1000, sources=4000))
    await runtime.state(BUCKET).create(f"StoredPlaces/{P}/storage_bytes", said.SerializeToString())
    assert await runtime.storage.used(P) == 59321
    await runtime.storage.check(P)
    async with runtime.storage.claim([P], f"{P}/datasets/new", 679):
        with pytest.raises(QuotaExceeded) as told:
            async with runtime.storage.claim([P], f"{P}/datasets/other", 1):
                raise AssertionError
    assert told.value.is_callers_fault and told.value.metadata["used"] == "60000"
    await runtime.storage.check("projects/p-3")
    with pytest.raises(QuotaExceeded):
        await runtime.storage.check("projects/p-2")


def test_the_size_of_files_is_that_of_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert size_of({"a": tmp_path / "a", "b": b"123"}) == 8
