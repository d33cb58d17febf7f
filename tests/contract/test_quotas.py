"""Quotas over real gRPC: set by whom, counted where, refused how, and known to every service within seconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from codegraft.access.v1.access_pb2 import ROLE_CONTRIBUTOR, ROLE_OPERATOR, ROLE_READER
from codegraft.access.v1.quota_pb2 import Limits, Quota, StorageUsage
from codegraft.common.v1.job_pb2 import JOB_STATE_QUEUED
from codegraft.ingest.v1 import project_pb2, project_pb2_grpc, upload_pb2
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from services.core import errors
from services.core.auth.keyring import BUCKET
from services.core.jobs import request_cancel
from services.core.nats_connection import connect
from services.core.quota.limits import Defaults, Kind
from services.core.quota.quotas import Quotas, table
from services.core.runtime import Runtime
from services.core.state.nats import NatsState
from services.core.telemetry import figures
from tests.conftest import NatsServer
from tests.contract.quota_world import DATASET, House, house


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[House]:
    async with house(Runtime.memory(tmp_path / "cache"), tmp_path / "cache") as made:
        yield made


async def limit(world: House, owner: str, **limits: int) -> None:
    await world.client.quotas.set(owner, Limits(**limits))
    for kind, value in limits.items():
        await world.until_known(owner, Kind(kind), value)


def refusals(quota: str, owner: str) -> float:
    return figures.QUOTA_REFUSALS.labels(quota, owner)._value.get()  # type: ignore[no-any-return]


# --- requests ---------------------------------------------------------------------------------------------------


async def call(world: House, key: str) -> status_pb2.Status | None:
    """GetProject as any client makes it, without retries; the status that it fails with."""
    async with grpc.aio.insecure_channel(world.addresses.ingest) as channel:
        stub = project_pb2_grpc.ProjectServiceStub(channel)
        metadata = (("authorization", f"Bearer {key}"),)
        try:
            await stub.GetProject(project_pb2.GetProjectRequest(name="projects/a"), metadata=metadata)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            details = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
            assert isinstance(details, bytes)
            return status_pb2.Status.FromString(details)
    return None


async def test_requests_over_the_limit_are_refused_and_told_when_to_come_back(world: House) -> None:
    made, secret = await world.client.keys.create(ROLE_READER, projects=["a"], key_id="eager")
    _, other = await world.client.keys.create(ROLE_READER, projects=["a"])
    await limit(world, made.name, requests_per_minute=120)
    before = refusals("requests_per_minute", "key")
    assert [await call(world, secret) for _ in range(120)] == [None] * 120
    while (refused := await call(world, secret)) is None:  # meanwhile there was room again, on a slow machine
        pass
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in refused.details:
        for message in (info, retry):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
    assert (info.reason, info.domain) == ("QUOTA_EXCEEDED", "codegraft.dev")
    assert info.metadata["owner"] == "keys/eager" and info.metadata["quota"] == "requests_per_minute"
    assert info.metadata["limit"] == "120" and int(info.metadata["used"]) > 118
    delay = retry.retry_delay.ToNanoseconds() / 1e9
    assert 0 < delay <= 0.5
    assert refusals("requests_per_minute", "key") - before == 1
    assert await call(world, other) is None, "another key has its own"
    await asyncio.sleep(delay + 0.01)
    assert await call(world, secret) is None


async def test_a_projects_limit_holds_for_all_its_keys_and_for_no_other_project(world: House) -> None:
    await limit(world, "projects/a", requests_per_minute=2)
    await world.client.projects.get("a")
    contributor = world.client.with_key((await world.client.keys.create(ROLE_CONTRIBUTOR, projects=["a"]))[1])
    await contributor.projects.get("a")
    refused = [client.projects.get("a") for client in (contributor, world.client)]
    for attempt in refused:
        with pytest.raises(errors.QuotaExceeded) as told:
            await attempt
        assert told.value.metadata["owner"] == "projects/a"
    await world.client.projects.get("b")
    await world.client.with_key(world.service_key).projects.get("a")  # another service's call is nobody's use
    used = await world.client.quotas.usage("projects/a")
    assert used.requests_per_minute == 2


async def test_watches_and_what_lifts_a_limit_are_not_counted(world: House) -> None:
    source = (await world.client.sources.add_file("a", b"x = 1\n", path="a.py")).name
    await limit(world, "projects/a", requests_per_minute=0)
    await limit(world, "keys/root", requests_per_minute=0)
    with pytest.raises(errors.QuotaExceeded):
        await world.client.sources.get(source)
    assert await anext(aiter(world.client.sources.watch(source)))
    assert (await world.client.keys.whoami()).subject == "keys/root"
    for owner in ("projects/a", "keys/root"):
        await world.client.quotas.set(owner, Limits())
        await world.until_known(owner, Kind.REQUESTS, None)
    await world.client.sources.get(source)


# --- runs and scans ---------------------------------------------------------------------------------------------


async def test_of_runs_at_once_as_many_pass_as_there_are_places(world: House) -> None:
    _, secret = await world.client.keys.create(ROLE_CONTRIBUTOR, projects=["a"], key_id="lab")
    lab = world.client.with_key(secret)
    await limit(world, "projects/a", runs=2)
    tried = await asyncio.gather(*(lab.runs.create("a", dataset=DATASET) for _ in range(6)), return_exceptions=True)
    runs = [each for each in tried if not isinstance(each, BaseException)]
    refused = [each for each in tried if isinstance(each, errors.QuotaExceeded)]
    assert (len(runs), len(refused)) == (2, 4)
    assert refused[0].metadata["quota"] == "runs" and (refused[0].retry_after or 0) >= 1
    assert runs[0].creator == "keys/lab" and (await lab.quotas.usage("projects/a")).runs == 2
    await lab.runs.pause(runs[0].name)
    third = await lab.runs.create("a", dataset=DATASET)
    with pytest.raises(errors.QuotaExceeded):
        await lab.runs.resume(runs[0].name)
    assert (await lab.runs.resume(third.name)).status.state == JOB_STATE_QUEUED, "it has its place already"
    await lab.runs.cancel(third.name)
    await lab.runs.resume(runs[0].name)
    await limit(world, "projects/a", runs=100)
    await limit(world, "keys/lab", runs=2)
    with pytest.raises(errors.QuotaExceeded) as told:
        await lab.runs.create("a", dataset=DATASET)
    assert told.value.metadata["owner"] == "keys/lab"
    await world.client.runs.create("a", dataset=DATASET)


async def test_a_run_that_says_when_it_ends_says_when_there_is_room(world: House) -> None:
    await limit(world, "projects/a", runs=1)
    run = await world.client.runs.create("a", dataset=DATASET, request_id="r")
    await world.trainer.tables.runs.mutate(run.name, lambda it: setattr(it.status.progress, "eta_seconds", 321.0))
    with pytest.raises(errors.QuotaExceeded) as told:
        await world.client.runs.create("a", dataset=DATASET)
    assert told.value.retry_after == 321.0
    again = await world.client.runs.create("a", dataset=DATASET, request_id="r")
    assert again.name == run.name, "the same request once more takes no second place"
    await world.trainer.tables.runs.mutate(run.name, lambda it: request_cancel(it.status))
    await world.client.runs.create("a", dataset=DATASET)


async def test_of_scans_at_once_as_many_pass_as_there_are_places(world: House) -> None:
    added = await world.client.sources.add_file("a", b"x = 1\n", path="a.py")
    await world.client.sources.wait(added.name)
    snapshot = (await world.client.snapshots.create("a")).name
    await limit(world, "projects/a", scans=1)
    tried = await asyncio.gather(*(world.client.scans.create("a", snapshot) for _ in range(4)), return_exceptions=True)
    [scan] = [each for each in tried if not isinstance(each, BaseException)]
    assert sum(isinstance(each, errors.QuotaExceeded) for each in tried) == 3
    assert scan.creator == "keys/root" and (await world.client.quotas.usage("projects/a")).scans == 1
    await world.client.scans.cancel(scan.name)
    await world.client.scans.create("a", snapshot)


# --- storage ----------------------------------------------------------------------------------------------------


async def test_uploads_and_sources_have_to_fit(world: House) -> None:
    await limit(world, "projects/b", storage_bytes=5000)
    tried = await asyncio.gather(
        *(world.client.sources.upload("b", bytes([n]) * 2000) for n in range(5)), return_exceptions=True
    )
    assert sum(isinstance(each, errors.QuotaExceeded) for each in tried) == 3, tried
    assert (await world.client.quotas.usage("projects/b")).storage_bytes == 4000
    with pytest.raises(errors.QuotaExceeded) as told:
        await world.client.sources.upload("b", b"x" * 1001)
    assert told.value.metadata["used"] == "4000" and told.value.metadata["limit"] == "5000"
    upload = next(each for each in tried if not isinstance(each, BaseException))
    number = next(n for n in range(5) if tried[n] is upload)
    assert await world.client.sources.upload("b", bytes([number]) * 2000) == upload, "what is there needs no room"
    # The upload has room, the files that it becomes have not.
    added = await world.client.sources.add_file("b", b"y" * 900, path="a.py")
    with pytest.raises(errors.QuotaExceeded, match="projects/b"):
        await world.client.sources.wait(added.name)
    await limit(world, "projects/b", storage_bytes=5800)
    await world.client.sources.sync(added.name)
    assert (await world.client.sources.wait(added.name)).byte_count == 900
    await limit(world, "projects/b", storage_bytes=1000)
    with pytest.raises(errors.QuotaExceeded):
        await world.client.sources.add_file("b", b"y" * 900, path="b.py")  # whose upload is there
    await world.client.sources.sync(added.name)
    assert (await world.client.sources.wait(added.name)).byte_count == 900, "what it has, it keeps"


async def test_a_key_pays_for_what_it_made_and_a_project_for_its_artifacts(world: House) -> None:
    _, secret = await world.client.keys.create(ROLE_CONTRIBUTOR, projects=["a"], key_id="ci")
    mine = world.client.with_key(secret)
    assert (await world.client.quotas.usage("projects/a")).storage_bytes == 100, "the dataset"
    await limit(world, "keys/ci", storage_bytes=3000)
    await world.client.sources.upload("a", b"r" * 5000)
    await mine.sources.upload("a", b"m" * 2500)
    with pytest.raises(errors.QuotaExceeded) as told:
        await mine.sources.upload("a", b"n" * 1000)
    assert told.value.metadata["owner"] == "keys/ci"
    used = await mine.quotas.usage("keys/ci")
    assert used.storage_bytes == 2500
    assert (await mine.quotas.usage("projects/a")).storage_bytes == 7600


async def until_others_count(world: House, project: str, total: int) -> None:
    async with asyncio.timeout(5):
        while await world.runtime.storage.used(project) != total:  # noqa: ASYNC110  # as a service sees it
            await asyncio.sleep(0.02)


async def test_what_is_stored_is_told_by_what_it_is_and_known_to_all_services(world: House) -> None:
    """The others have of ingest's records their sums, a moment later."""
    runtime = world.runtime
    added = await world.client.sources.add_file("a", b"y" * 900, path="a.py")
    await world.client.sources.wait(added.name)
    await world.client.snapshots.create("a")
    run = "projects/a/runs/r"
    for name, size in ((f"{run}/checkpoints/1", 70), (f"{run}/states/1", 60), ("projects/a/scans/s", 50)):
        await runtime.artifacts.commit(name, AdapterManifest(name=name), {"file": b"x" * size})
    stored = await world.client.quotas.stored("projects/a")
    assert (stored.adapters, stored.uploads, stored.sources, stored.training_states) == (70, 900, 900, 60)
    assert stored.datasets == 100 + 50 and stored.snapshots > 0
    total = sum(size for _, size in stored.ListFields())
    assert (await world.client.quotas.usage("projects/a")).storage_bytes == total
    await until_others_count(world, "projects/a", total)
    assert await world.client.quotas.stored("keys/root") == StorageUsage(uploads=900, sources=900)
    await world.client.sources.remove(added.name)
    await until_others_count(world, "projects/a", total - 900)


async def test_an_upload_that_breaks_off_gives_its_room_back(world: House) -> None:
    await limit(world, "projects/b", storage_bytes=3000)
    announced = upload_pb2.Upload(sha256="0" * 64, size=3000)
    with pytest.raises(errors.UploadMismatch):
        await world.client.sources.send("b", announced, 0, iter([b"z" * 3000]))
    await world.client.sources.upload("b", b"x" * 3000)


# --- who sets what, and who learns of it ------------------------------------------------------------------------


async def test_what_was_set_is_told_with_who_set_it_and_what_counts(world: House) -> None:
    quotas = world.client.quotas
    nothing = await quotas.get("projects/a")
    assert nothing.quota == Quota(name="projects/a/quota") and nothing.effective == Limits()
    stored = await quotas.set("projects/a", Limits(runs=2, scans=-1))
    assert stored.quota.updater == "keys/root" and stored.quota.HasField("update_time")
    assert stored.effective == Limits(runs=2), "without a limit nothing is told"
    assert await quotas.get("projects/a") == await quotas.get("projects/a")
    assert (await quotas.get("projects/a")).quota == stored.quota
    await quotas.set("projects/a", Limits(runs=3), etag=stored.quota.etag)
    with pytest.raises(errors.EtagMismatch):
        await quotas.set("projects/a", Limits(runs=4), etag=stored.quota.etag)
    await world.client.projects.delete("a", force=True)
    await world.client.projects.create("a")
    assert await quotas.get("projects/a") == nothing, "of the project before"


async def test_nobody_lifts_his_own_limits_and_strangers_see_none(world: House) -> None:
    keys, quotas = world.client.keys, world.client.quotas
    of_a = world.client.with_key((await keys.create(ROLE_OPERATOR, projects=["a"], key_id="of-a"))[1])
    reader = world.client.with_key((await keys.create(ROLE_READER, projects=["a"], key_id="reader"))[1])
    of_all = world.client.with_key((await keys.create(ROLE_READER, all_projects=True, key_id="of-all"))[1])
    await keys.create(ROLE_READER, projects=["a", "b"], key_id="both")
    for attempt in (
        of_a.quotas.set("projects/a", Limits(runs=9)),
        of_a.quotas.set("keys/both", Limits(runs=9)),
        of_a.quotas.set("keys/root", Limits(runs=9)),
        reader.quotas.set("keys/reader", Limits(runs=9)),
        reader.quotas.get("projects/b"),
        reader.quotas.get("keys/of-a"),
        of_a.quotas.get("keys/both"),
        of_a.quotas.get("keys/root"),
        reader.quotas.usage("projects/b"),
        of_a.quotas.usage("keys/both"),
        of_all.quotas.usage("keys/both"),
    ):
        with pytest.raises(errors.PermissionDenied):
            await attempt
    await of_a.quotas.set("keys/reader", Limits(requests_per_minute=500))
    await world.until_known("keys/reader", Kind.REQUESTS, 500)
    assert (await reader.quotas.get("keys/reader")).effective.requests_per_minute == 500
    assert (await reader.quotas.get("projects/a")).effective == Limits()
    assert (await reader.quotas.usage("keys/reader")).requests_per_minute == 0
    for wrong, kind in (
        (quotas.set("projects/none", Limits()), errors.ProjectNotFound),
        (quotas.set("keys/none", Limits()), errors.KeyNotFound),
        (quotas.get("projects/none"), errors.ProjectNotFound),
        (quotas.set("projects/a/runs/r", Limits()), errors.InvalidName),
        (quotas.get("a"), errors.InvalidName),
        (quotas.set("projects/a", Limits(runs=-2)), errors.InvalidArgument),
    ):
        with pytest.raises(kind) as told:
            await wrong
        assert told.value.field.startswith(("name", "quota."))


async def test_defaults_count_where_nothing_was_set(tmp_path: Path) -> None:
    defaults = Defaults(requests_per_minute=6000, runs=1)
    runtime = Runtime.memory(tmp_path / "cache", quota_project=defaults, quota_key=Defaults(scans=5))
    async with house(runtime, tmp_path / "cache") as world:
        told = (await world.client.quotas.get("projects/a")).effective
        assert told == Limits(requests_per_minute=6000, runs=1)
        assert (await world.client.quotas.get("keys/root")).effective == Limits(scans=5)
        await world.client.runs.create("a", dataset=DATASET)
        with pytest.raises(errors.QuotaExceeded):
            await world.client.runs.create("a", dataset=DATASET)
        stored = await world.client.quotas.set("projects/a", Limits(runs=-1))
        assert stored.effective == Limits(requests_per_minute=6000)
        await world.until_known("projects/a", Kind.RUNS, None)
        await world.client.runs.create("a", dataset=DATASET)


async def test_every_process_learns_of_a_limit_within_seconds_and_keeps_it_while_nats_is_away(
    own_nats_server: NatsServer,
) -> None:
    login = {"user": own_nats_server.user, "password": own_nats_server.password}
    first, second = [await connect(own_nats_server.url, **login) for _ in range(2)]  # type: ignore[arg-type]
    here, there = Quotas(NatsState(first, BUCKET)), Quotas(NatsState(second, BUCKET))
    following = [asyncio.create_task(each.run()) for each in (here, there)]
    records = table(NatsState(first, BUCKET))

    async def until(limit: int | None) -> None:
        async with asyncio.timeout(5):
            while not all(each.limit(Kind.RUNS, "projects/a") == limit for each in (here, there)):  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    await records.create(Quota(name="projects/a/quota", limits=Limits(runs=2)))
    began = time.monotonic()
    await until(2)
    assert time.monotonic() - began < 5
    await records.mutate("projects/a/quota", lambda it: it.ClearField("limits"))
    await until(None)
    await records.mutate("projects/a/quota", lambda it: it.MergeFrom(Quota(limits=Limits(runs=0))))
    await until(0)
    own_nats_server.stop()
    await asyncio.sleep(0.1)
    assert [each.limit(Kind.RUNS, "projects/a") for each in (here, there)] == [0, 0]
    for task in following:
        task.cancel()
    await asyncio.gather(*following, return_exceptions=True)
    for connection in (first, second):
        await connection.close()
