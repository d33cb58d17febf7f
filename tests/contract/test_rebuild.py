"""Rebuild of the control state, of what real services have left in one real object store, into a real NATS server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
from cryptography.fernet import Fernet
from google.protobuf import json_format

from codegraft.common.v1.job_pb2 import JOB_STATE_FAILED, JOB_STATE_SUCCEEDED
from codegraft.common.v1.split_pb2 import SPLIT_TEST
from codegraft.inference.v1.serving_pb2 import (
    SERVING_MODE_LATEST_BEST,
    SERVING_MODE_OFF,
    SERVING_MODE_PINNED,
    Serving,
)
from codegraft.ingest.v1.snapshot_pb2 import Snapshot
from codegraft.ingest.v1.source_pb2 import FileSource, GitSource, Source
from codegraft.scanner.v1.dataset_pb2 import Dataset
from codegraft.scanner.v1.scan_pb2 import Scan
from codegraft.trainer.v1.checkpoint_pb2 import Checkpoint
from codegraft.trainer.v1.run_pb2 import Run
from services.cli.control import rebuild
from services.cli.control.installation import Control, Installation
from services.client.aio.client import AsyncCodegraft
from services.core import errors
from services.core.runtime import Runtime
from services.inference.copies import mirror
from services.ingest.assembly import Ingest
from services.ingest.config import IngestSettings
from services.trainer.records import Story
from tests.contract.control_fixtures import DATASET, RUN, SNAPSHOT, P, commit, everything, live, table, wipe
from tests.servers.ingest import serving

pytest_plugins = "tests.contract.control_fixtures"
pytestmark = pytest.mark.usefixtures("own_logs")


async def test_manifests_make_the_records_anew(control: Control, place: Installation) -> None:
    await commit(control)
    await control.store.put("projects/q/datasets/x/manifest.json", b"{damaged")
    made, _, planned = await rebuild._rebuild(place, dry_run=True)
    written = {"projects": 1, "snapshots": 1, "datasets": 1, "scans": 3, "checkpoints": 3, "runs": 1}
    assert planned.written == written | {"uploads": 0, "sources": 0, "policies": 0}
    assert not any((await everything(control)).values())
    _, _, outcome = await rebuild._rebuild(place, dry_run=False)
    assert outcome.written == planned.written and made.unreadable == ["projects/q/datasets/x"]
    assert [(one.source, one.commit) for one in made.lost_sources] == [(f"{P}/sources/git", "c0ffee")]

    snapshot = await table(control, "ingest", Snapshot).get(SNAPSHOT)
    assert snapshot.file_count == 1 and snapshot.HasField("create_time")
    dataset = await table(control, "scanner", Dataset).get(DATASET)
    assert (dataset.digest, dataset.snapshot, dataset.train.files) == ("d" * 64, SNAPSHOT, 1)
    scans = {scan.name.rpartition("/")[2]: scan for scan in await table(control, "scanner", Scan).all(P)}
    assert scans["good"].status.state == scans["old"].status.state == JOB_STATE_SUCCEEDED
    assert scans["good"].dataset == scans["old"].dataset == DATASET and dataset.scan == f"{P}/scans/good"
    assert scans["good"].settings.min_tokens == 7 and scans["good"].report.rejected_count == 3
    assert scans["broken"].status.state == JOB_STATE_FAILED and scans["broken"].status.failure.hint
    run = await table(control, "trainer", Run).get(RUN)
    assert run.status.state == JOB_STATE_SUCCEEDED and run.requested.lora_r == 4 and not run.imported
    # The last that was marked, not the one with the lowest loss: that one forgot other code.
    assert (run.best_checkpoint, run.best_test_loss, run.step) == (f"{RUN}/checkpoints/2", 1.2, 3)
    checkpoints = await table(control, "trainer", Checkpoint).all(f"{RUN}/")
    assert [(one.step, one.best, one.size) for one in checkpoints] == [(1, False, 1), (2, True, 2), (3, False, 3)]
    story = await Story(control.state("trainer")).read(RUN, 0, run.last_sequence)
    assert [event.sequence for event in story] == [1, 2, 3, 4, 5] and story[-1].best.step == 2

    _, _, again = await rebuild._rebuild(place, dry_run=False)
    assert not any(again.written.values()) and again.there == planned.written


async def ingest_at(place: Installation, stack: AsyncExitStack) -> AsyncCodegraft:
    """Ingest, as it runs in that installation; and its client."""
    settings = place.settings.model_dump() | {"ingest_credential_keys": (Fernet.generate_key().decode(),)}
    chosen = IngestSettings(**settings)
    runtime = await stack.enter_async_context(Runtime.open("ingest", chosen))
    return await stack.enter_async_context(serving(Ingest(runtime, chosen)))


async def copied(control: Control) -> set[str]:
    return {key async for key in control.store.list("records/")}


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await true():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_sources_and_policies_come_back_and_go_on(control: Control, place: Installation) -> None:
    await commit(control)
    policies = table(control, "inference", Serving)
    pinned = f"{RUN}/checkpoints/2"
    async with AsyncExitStack() as stack:
        client = await ingest_at(place, stack)
        mirroring = asyncio.create_task(mirror(policies, control.store).run())
        await policies.create(Serving(name=f"{P}/serving", mode=SERVING_MODE_PINNED, pinned_checkpoint=pinned))
        await client.projects.create("p", title="Acme", exclude=["*.min.js"])
        await client.projects.create("gone")
        for project, id in ((P, "code"), (P, "removed"), ("projects/gone", "code")):
            upload = await client.sources.upload(project, f"print({id!r})\n".encode())
            origin = Source(file=FileSource(upload=upload.name, path="a.py"), split=SPLIT_TEST, exclude=["x/"])
            await client.sources.wait((await client.sources.add(project, origin, source_id=id)).name)
        token = await client.credentials.create_token(P, "very secret", credential_id="token")
        git = GitSource(url="https://git.invalid/a", credential=token.name)
        await client.sources.add(P, Source(git=git, sync_interval_seconds=3600), source_id="private")
        await client.sources.remove(f"{P}/sources/removed")
        taken = await client.snapshots.create(P)
        await client.snapshots.create("projects/gone")
        await client.projects.delete("projects/gone", force=True)
        before = await client.sources.get(f"{P}/sources/code")
        names = {f"ingest/Project/{P}", "ingest/Project/projects/gone", f"inference/Serving/{P}/serving"}
        names |= {f"ingest/Source/{P}/sources/{id}" for id in ("code", "private")}
        wanted = {f"records/{name}.json" for name in names}
        await until(lambda: _equal(copied(control), wanted))
        mirroring.cancel()
    assert not [key for key in wanted if b"very secret" in await control.store.get(key)]

    await wipe(control)
    _, records, outcome = await rebuild._rebuild(place, dry_run=False)
    assert {kind: outcome.written[kind] for kind in ("projects", "uploads", "sources", "policies")} == {
        "projects": 1, "uploads": 1, "sources": 2, "policies": 1,
    }  # fmt: skip
    assert outcome.credentials == [token.name] and records.deleted == {"projects/gone"}
    assert not outcome.uploads and not outcome.unfit
    policy = await policies.get(f"{P}/serving")
    assert (policy.mode, policy.pinned_checkpoint) == (SERVING_MODE_PINNED, pinned)
    async with AsyncExitStack() as stack:
        client = await ingest_at(place, stack)
        project = await client.projects.get(P)
        assert (project.title, list(project.exclude)) == ("Acme", ["*.min.js"])
        again = await client.sources.wait(before.name)  # which is fetched, of the upload that came back
        for part in ("content_digest", "split", "exclude", "creator", "request_id", "file_count"):
            assert getattr(again, part) == getattr(before, part), part
        assert (await client.snapshots.create(P)).name == taken.name
        with pytest.raises(errors.CredentialNotFound):
            await client.sources.wait(f"{P}/sources/private")
        with pytest.raises(errors.SourceNotFound):
            await client.sources.get(f"{P}/sources/removed")
        with pytest.raises(errors.ProjectNotFound):
            await client.projects.get("projects/gone")
        await client.sources.remove(f"{P}/sources/private")
        await until(lambda: _lacks(copied(control), f"records/ingest/Source/{P}/sources/private.json"))

        _, _, repeated = await rebuild._rebuild(place, dry_run=False)
        assert not any(repeated.written.values()) and repeated.there["sources"] == 1


async def _equal(found: Awaitable[set[str]], wanted: set[str]) -> bool:
    return await found == wanted


async def _lacks(found: Awaitable[set[str]], key: str) -> bool:
    return key not in await found


async def test_a_persons_policy_takes_the_place_of_one_that_came_by_itself(
    control: Control, place: Installation
) -> None:
    def policy(project: str, **parts: object) -> Serving:
        return Serving(name=f"projects/{project}/serving", **parts)  # type: ignore[arg-type]

    async def copy(of: Serving) -> None:
        text = json_format.MessageToJson(of, preserving_proto_field_name=True)
        await control.store.put(f"records/inference/Serving/{of.name}.json", text.encode())

    policies = table(control, "inference", Serving)
    for project in ("first", "second"):
        await copy(policy(project, mode=SERVING_MODE_OFF, decided=True))
    await policies.create(policy("first", mode=SERVING_MODE_LATEST_BEST, wanted_checkpoint="whatever"))
    await policies.create(policy("second", mode=SERVING_MODE_LATEST_BEST, decided=True))
    _, _, planned = await rebuild._rebuild(place, dry_run=True)
    _, _, outcome = await rebuild._rebuild(place, dry_run=False)
    assert planned.written["policies"] == outcome.written["policies"] == outcome.there["policies"] == 1
    found = {one.name: (one.mode, one.wanted_checkpoint) for one in await policies.all()}
    assert found == {
        "projects/first/serving": (SERVING_MODE_OFF, ""),
        "projects/second/serving": (SERVING_MODE_LATEST_BEST, ""),
    }


async def test_what_is_there_stays_as_it_is(control: Control, place: Installation) -> None:
    await commit(control)
    await live(control)
    before = await everything(control)
    await rebuild._rebuild(place, dry_run=False)
    after = await everything(control)
    assert after["ingest"] == before["ingest"]
    run = await table(control, "trainer", Run).get(RUN)
    assert run.title == "ours" and run.last_sequence == 0
    assert (await table(control, "trainer", Checkpoint).get(f"{RUN}/checkpoints/2")).kept
