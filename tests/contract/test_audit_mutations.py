"""Every RPC that changes something, made once at real services: its record says who, what, when, before and after."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from codegraft.access.v1.access_pb2 import ROLE_OPERATOR, ROLE_READER
from codegraft.access.v1.audit_pb2 import AuditRecord
from codegraft.access.v1.quota_pb2 import Limits
from codegraft.inference.v1 import serving_pb2 as pb
from codegraft.inference.v1.feedback_pb2 import FEEDBACK_EVENT_ACCEPTED
from codegraft.ingest.v1.source_pb2 import Source
from codegraft.scanner.v1.dataset_pb2 import DatasetManifest
from services.client import Addresses, AsyncCodegraft
from services.core import errors
from services.core.audit.log import MemoryAudit
from services.core.auth import policy
from services.core.runtime import Runtime
from services.inference.policy import Best
from tests.contract.inference_world import PROJECT, World, until
from tests.contract.quota_world import DATASET, House, house
from tests.rpcs import METHODS
from tests.unit.trainer.whole import make_adapter, make_base

pytest_plugins = ["tests.contract.inference_fixtures"]

NEW, CHANGED, GONE = "new", "changed", "gone"
EXPECTED = {
    "CreateProject": {NEW}, "UpdateProject": {CHANGED}, "DeleteProject": {GONE},
    "CreateSource": {NEW}, "UpdateSource": {CHANGED}, "SyncSource": {CHANGED}, "DeleteSource": {GONE},
    "ForgetSource": {GONE}, "UploadContent": {NEW},
    "CreateCredential": {NEW}, "UpdateCredential": {CHANGED}, "DeleteCredential": {GONE},
    "CreateSnapshot": {NEW}, "DeleteSnapshot": {GONE}, "CollectGarbage": {NEW},
    "CreateKey": {NEW}, "RotateKey": {CHANGED}, "RevokeKey": {CHANGED}, "SetQuota": {NEW, CHANGED},
    "CreateScan": {NEW}, "CancelScan": {CHANGED},
    "CreateRun": {NEW}, "PauseRun": {CHANGED}, "ResumeRun": {CHANGED}, "CancelRun": {CHANGED},
    "KeepCheckpoint": {CHANGED}, "ImportAdapter": {NEW}, "PushModel": {NEW},
    "SetServing": {NEW, CHANGED}, "ApproveServing": {CHANGED}, "LoadAdapter": {NEW}, "UnloadAdapter": {GONE},
    "DeleteKeptCompletions": {GONE},
}  # fmt: skip
"""What each does to what is stored."""


def test_every_rpc_that_changes_something_is_here() -> None:
    assert set(EXPECTED) == {method.rpartition("/")[2] for method in METHODS if policy.changes(method)}


def check(records: list[AuditRecord], caller: str) -> set[str]:
    """The RPCs whose records say all that they should."""
    found: dict[str, set[str]] = {}
    for record in records:
        name = record.method.rpartition("/")[2]
        assert (record.caller, record.code, record.reason) == (caller, "OK", ""), record
        assert abs(record.time.ToDatetime(UTC) - datetime.now(UTC)) < timedelta(minutes=1) and record.request_id
        assert record.resources or record.changes, "what it was about"
        for change in record.changes:
            assert change.name and (change.HasField("before") or change.HasField("after")), record
            there = change.HasField("before"), change.HasField("after")
            kind = {(False, True): NEW, (True, False): GONE, (True, True): CHANGED}[there]
            assert kind != CHANGED or change.before != change.after, record
            found.setdefault(name, set()).add(kind)
    for name, kinds in found.items():
        assert kinds >= EXPECTED[name], (name, kinds)
    return set(found)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[House]:
    base = make_base("llama", tmp_path / "base")
    async with house(Runtime.memory(tmp_path / "cache"), tmp_path / "cache", f"dir:{base}") as made:
        yield made


def records(runtime: Runtime) -> list[AuditRecord]:
    assert isinstance(runtime.audit, MemoryAudit)
    return runtime.audit.records


async def test_ingest_scanner_and_trainer(world: House, tmp_path: Path) -> None:
    client, base = world.client, tmp_path / "base"
    project = await client.projects.get("a")
    project.title = "new"
    await client.projects.update(project)
    credential = await client.credentials.create_token("a", "hush", username="me", credential_id="hub")
    credential.title = "new"
    await client.credentials.update(credential)
    await client.credentials.delete(credential.name)
    for name in ("one", "two"):
        await client.sources.add_file("a", f"{name} = 1\n".encode(), path=f"{name}.py", source_id=name)
        await client.sources.wait(f"projects/a/sources/{name}")
    snapshot = (await client.snapshots.create("a")).name
    await client.sources.update(Source(name="projects/a/sources/one", exclude=["*.md"]))
    await client.sources.sync("projects/a/sources/one")
    await client.sources.wait("projects/a/sources/one")
    scan = (await client.scans.create("a", snapshot)).name
    await client.scans.cancel(scan)
    await client.snapshots.delete(snapshot)
    await client.sources.remove("projects/a/sources/one")
    await client.sources.forget("projects/a/sources/two")
    _ = [each async for each in client.snapshots.collect_garbage()]
    run = (await client.runs.create("a", dataset=DATASET)).name
    await client.runs.pause(run)
    await client.runs.resume(run)
    await client.runs.cancel(run)
    adapter = make_adapter(base, tmp_path / "adapter")
    imported = await client.adapters.upload("a", adapter)
    await client.runs.keep(f"{imported.name}/checkpoints/0")
    await client.models.push(base, "tiny-1.0")
    await client.keys.create(ROLE_READER, projects=["a"], key_id="k")
    await client.keys.rotate("k")
    await client.keys.revoke("k")
    for owner in ("projects/a", "keys/k"):
        await client.quotas.set(owner, Limits(runs=1))
        await client.quotas.set(owner, Limits(runs=2))
    await client.projects.delete("b")
    assert check(records(world.runtime), "keys/root") == {
        name for method in METHODS if policy.changes(method) and ".inference." not in method
        for name in [method.rpartition("/")[2]]
    }  # fmt: skip
    for record in records(world.runtime):
        if record.method.endswith(("Key", "SetQuota")):
            assert record.project == "projects/a" and record.resources, record


async def test_inference(worlds: Callable[..., Any]) -> None:
    world: World = await worlds()

    async def on(name: str) -> Callable[[dict[str, Any]], None]:
        """Of a dataset with the same test set as the other's."""
        files = {f"train/{name}.parquet": name.encode(), "test/part-00000.parquet": b"test"}
        name = f"{PROJECT}/datasets/{name}"
        await world.runtime.artifacts.commit(name, DatasetManifest(name=name), files)
        return lambda parts: parts.update(dataset=name, dataset_digest=name)

    one = await world.store(1, 1, await on("a"))
    two = await world.store(1, 2, await on("b"), f"{PROJECT}/runs/two")
    three = await world.store(3, 3)
    await world.set("OFF")
    await world.set("LATEST_BEST")
    await world.publish(one)
    await world.until_active(one.sha256)
    await world.publish(Best(two.checkpoint, two.sha256, two.base_model, two.base_digest, 9.0))  # worse: it waits
    await until(lambda: bool(world.told("codegraft.inference.adapter.waiting.v1")))
    await world.serving.LoadAdapter(pb.LoadAdapterRequest(checkpoint=three.checkpoint))
    await world.serving.UnloadAdapter(pb.UnloadAdapterRequest(checkpoint=three.checkpoint))
    await world.serving.ApproveServing(pb.ApproveServingRequest(parent=PROJECT, checkpoint=two.checkpoint))
    world.peers.keeps = True
    async with AsyncCodegraft(Addresses(*[world.address] * 4)) as client:
        completed = await world.complete(max_tokens=1).end()
        await client.feedback.record(PROJECT, completed.started.completion_id, FEEDBACK_EVENT_ACCEPTED, text="x = 1")
        assert await client.feedback.delete_kept(PROJECT) == 1
    found = check(records(world.runtime), "anonymous")
    assert found == {"SetServing", "ApproveServing", "LoadAdapter", "UnloadAdapter", "DeleteKeptCompletions"}


async def test_a_change_of_a_key_is_seen_by_operators_of_all_its_projects(world: House) -> None:
    keys = world.client.keys
    of = {
        id: world.client.with_key((await keys.create(ROLE_OPERATOR, projects=list(id), key_id=f"of-{id}"))[1])
        for id in ("a", "b", "ab")
    }
    await keys.create(ROLE_READER, projects=["a", "b"], key_id="both")
    await keys.create(ROLE_READER, all_projects=True, key_id="all")
    with pytest.raises(errors.PermissionDenied):
        await of["b"].keys.revoke("of-a")

    async def seen(client: Any, project: str) -> set[str]:
        found = [each async for each in client.audit.list(project) if each.method.endswith("Key")]
        return {f"{each.resources[0].removeprefix('keys/')}{' denied' * (each.code != 'OK')}" for each in found}

    assert await seen(of["a"], "a") == {"of-a", "of-a denied"}
    assert await seen(of["b"], "b") == {"of-b"}
    assert await seen(of["ab"], "a") == {"of-a", "of-a denied", "of-ab", "both"}
    assert await seen(of["ab"], "b") == {"of-b", "of-ab", "both"}
    assert await seen(world.client, "-") == {"of-a", "of-a denied", "of-b", "of-ab", "both", "all"}
