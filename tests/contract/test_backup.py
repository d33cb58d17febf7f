"""Backup, restore and rebuild of the control state, between real NATS servers over one real object store."""

from __future__ import annotations

import asyncio
import gzip
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from codegraft.access.v1.access_pb2 import StoredKey
from codegraft.access.v1.audit_pb2 import AuditRecord
from codegraft.common.v1.job_pb2 import JOB_STATE_FAILED, JOB_STATE_SUCCEEDED
from codegraft.inference.v1.serving_pb2 import SERVING_MODE_OFF, Serving
from codegraft.ingest.v1.credential_pb2 import StoredCredential
from codegraft.ingest.v1.project_pb2 import Project
from codegraft.ingest.v1.snapshot_pb2 import Snapshot, SnapshotManifest, SnapshotSource
from codegraft.scanner.v1.dataset_pb2 import Dataset, DatasetManifest, DatasetPart, VerdictsManifest
from codegraft.scanner.v1.scan_pb2 import Scan
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest, Checkpoint
from codegraft.trainer.v1.run_event_pb2 import RunEvent
from codegraft.trainer.v1.run_pb2 import Run
from services.cli.control import archive, backup, installation, rebuild, restore
from services.cli.control.installation import Control, Installation
from services.cli.main import main
from services.core import errors
from services.core.audit.nats import NatsAudit
from services.core.auth.keyring import BUCKET as KEYS
from services.core.config import CoreSettings
from services.core.jobs import new_status
from services.core.jobs.nats import NatsQueue
from services.core.state import Table
from services.core.store import blobs
from services.core.store.s3 import S3Address
from services.trainer.records import Story
from tests.conftest import NatsServer

pytestmark = pytest.mark.usefixtures("own_logs")

P, RUN, DATASET, SNAPSHOT = "projects/p", "projects/p/runs/r", "projects/p/datasets/d", "projects/p/snapshots/s"


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def place(nats: NatsServer, s3_server: S3Address, tmp_path: Path, request: Any) -> Installation:
    return at(nats, s3_server, tmp_path, bucket=f"day-two-{abs(hash(request.node.name)) % 10**8}")


def at(nats: NatsServer, s3: S3Address, folder: Path, *, bucket: str) -> Installation:
    return Installation(
        CoreSettings(
            nats_url=nats.url,
            nats_user=nats.user,
            nats_password=nats.password,  # type: ignore[arg-type]
            s3_endpoint=s3.endpoint,
            s3_access_key=s3.access_key,  # type: ignore[arg-type]
            s3_secret_key=s3.secret_key,  # type: ignore[arg-type]
            s3_bucket=bucket,
            cache_dir=folder / "cache",
        )
    )


@pytest.fixture
async def control(place: Installation) -> Any:
    """Connections to an installation without any state, and an empty bucket."""
    settings = place.settings
    store = installation.S3Store(installation.s3_address(settings))
    await store.prepare()
    store.close()
    async with installation.opened(place) as opened:
        await wipe(opened)
        yield opened


async def wipe(control: Control) -> None:
    """NATS has lost everything."""
    for info in await control.nats.js.streams_info():
        await control.nats.js.delete_stream(info.config.name or "")


def table(control: Control, bucket: str, message_type: Any) -> Table[Any]:
    return Table(control.state(bucket), message_type, missing=errors.NotFound)


async def commit(control: Control) -> None:
    """What the store has of a project: a snapshot, scans with a dataset and without, a run with three adapters."""
    put = control.artifacts.commit
    source = SnapshotSource(
        source=f"{P}/sources/git", origin="https://git.corp.example/a", commit="c0ffee", file_count=1
    )
    await put(SNAPSHOT, SnapshotManifest(name=SNAPSHOT, digest="s" * 64, sources=[source], file_count=1), {"f": b"1"})
    part = DatasetPart(files=1, bytes=4, tokens=2)
    made = DatasetManifest(name=DATASET, digest="d" * 64, snapshot=SNAPSHOT, train=part, test=part)
    made.reasons["ACCEPTED"], made.reasons["BINARY"] = 2, 3
    made.settings.update({"min_tokens": 7})
    for name, dataset in (("good", DATASET), ("broken", f"{P}/datasets/never"), ("old", "")):
        scan = f"{P}/scans/{name}"
        await put(scan, VerdictsManifest(name=scan, snapshot=SNAPSHOT, dataset=dataset), {"v": name.encode()})
        if name == "good":
            await put(DATASET, made, {"train/part-00000.parquet": b"rows"})
    for step, loss, best in ((1, 1.5, True), (2, 1.2, True), (3, 1.1, False)):
        name = f"{RUN}/checkpoints/{step}"
        adapter = AdapterManifest(
            name=name, sha256=f"{step:064}", base_model="tiny", base_digest="b" * 64, dataset=DATASET, step=step,
            test_loss=loss, base_test_loss=2.0, best=best, strength=1.0,
        )  # fmt: skip
        adapter.hyperparameters.lora_r = 4
        await put(name, adapter, {"adapter_model.safetensors": b"w" * step})


async def live(control: Control) -> None:
    """The records that services write of all this, and more that only NATS has."""
    await table(control, "ingest", Project).create(Project(name=P, title="Acme"))
    await table(control, "ingest", StoredCredential).create(
        StoredCredential(name=f"{P}/credentials/c", sealed=b"sealed by ingest")
    )
    await table(control, "ingest", Snapshot).create(Snapshot(name=SNAPSHOT, digest="s" * 64))
    await table(control, "scanner", Dataset).create(Dataset(name=DATASET, scan=f"{P}/scans/good", snapshot=SNAPSHOT))
    await table(control, "trainer", Run).create(Run(name=RUN, title="ours", dataset=DATASET, status=new_status()))
    await table(control, "trainer", Checkpoint).create(Checkpoint(name=f"{RUN}/checkpoints/2", best=True, kept=True))
    await Story(control.state("trainer")).write(RUN, RunEvent(sequence=1, note="began"), 1)
    await table(control, "inference", Serving).create(Serving(name=f"{P}/serving", mode=SERVING_MODE_OFF))
    await table(control, KEYS, StoredKey).create(StoredKey(name="keys/mine"))
    await NatsAudit(control.nats, "ingest").append(AuditRecord(method="/Create", project=P))
    queue = NatsQueue(control.nats)
    await queue.submit("scan", f"{P}/scans/lost")
    taken = await queue.take("scan", 5)
    assert taken is not None
    await taken.dead_letter("three attempts")


async def everything(control: Control) -> dict[str, Any]:
    """All that a backup shall bring back, without revisions."""
    found: dict[str, Any] = {bucket: await backup.records_in(control, bucket) for bucket in (*backup.BUCKETS, KEYS)}
    return found | {stream: await backup.messages_in(control, stream) for stream in backup.STREAMS}


async def test_what_was_saved_comes_back_in_an_empty_installation(
    control: Control, place: Installation, tmp_path: Path
) -> None:
    await commit(control)
    await live(control)
    before = await everything(control)
    assert all(before.values())
    file, key = tmp_path / "backup.tar.gz", Fernet.generate_key().decode()
    contents = await backup._backup(place, file, key)
    assert file.stat().st_mode & 0o777 == 0o600
    assert b"keys/mine" not in gzip.decompress(file.read_bytes()), "who may call is not to be read"
    assert {one.name: one.records for one in contents.parts}["artifacts.jsonl"] == 8

    await wipe(control)
    _, parts = archive.read(file)
    done = await restore._restore(place, parts, key, force=False)
    assert not done.missing and not done.removed and not done.keys_left
    assert await everything(control) == before
    assert (await table(control, "trainer", Run).get(RUN)).title == "ours"
    records, _ = await NatsAudit(control.nats, "ingest").page(P, 0, "")
    assert [record.method for record in records] == ["/Create"]


async def test_a_full_installation_is_only_replaced_by_force(
    control: Control, place: Installation, tmp_path: Path
) -> None:
    await live(control)
    before = await everything(control)
    file = tmp_path / "backup.tar.gz"
    contents = await backup._backup(place, file, "")
    assert any("1 API keys" in line for line in contents.left_out)
    _, parts = archive.read(file)
    await table(control, "ingest", Project).create(Project(name="projects/later"))
    await table(control, "ingest", Project).mutate(P, lambda project: setattr(project, "title", "changed"))
    with pytest.raises(errors.FailedPrecondition, match="has 9 records already, in inference, trainer") as refused:
        await restore._restore(place, parts, "", force=False)
    assert "--force" in refused.value.hint
    done = await restore._restore(place, parts, "", force=True)
    assert done.removed == 1 and not done.keys_left and await everything(control) == before


async def test_objects_that_the_store_lost_are_told(control: Control, place: Installation, tmp_path: Path) -> None:
    await commit(control)
    await backup._backup(place, tmp_path / "b", "")
    _, parts = archive.read(tmp_path / "b")
    manifest = await control.artifacts.manifest(f"{RUN}/checkpoints/2", AdapterManifest)
    await control.store.delete(blobs.key(manifest.files[0].sha256))
    await control.store.delete(f"{SNAPSHOT}/manifest.json")
    done = await restore._restore(place, parts, "", force=False)
    assert done.missing == [f"{RUN}/checkpoints/2", SNAPSHOT]


async def test_a_backup_under_load_holds_whatever_its_records_name(
    control: Control, place: Installation, tmp_path: Path
) -> None:
    datasets, runs = table(control, "scanner", Dataset), table(control, "trainer", Run)

    async def work(one: int) -> None:
        for number in range(10_000):
            dataset = f"{P}/datasets/{one}-{number}"
            await datasets.create(Dataset(name=dataset))
            await runs.create(Run(name=f"{P}/runs/{one}-{number}", dataset=dataset))

    workers = [asyncio.create_task(work(one)) for one in range(8)]
    for attempt in range(3):
        file = tmp_path / str(attempt)
        await asyncio.sleep(0.1)
        await backup._backup(place, file, "")
        _, parts = archive.read(file)
        buckets = [archive.records_of(parts[f"kv/{bucket}.jsonl"]) for bucket in backup.BUCKETS]
        records = {one.key: one.value for bucket in buckets for one in bucket}
        named = {Run.FromString(value).dataset for key, value in records.items() if key.startswith("Run/")}
        assert len(named) > 5 and {f"Dataset/{name}" for name in named} <= records.keys()
    for worker in workers:
        worker.cancel()


async def test_a_damaged_or_foreign_file_writes_nothing(control: Control, place: Installation, tmp_path: Path) -> None:
    await live(control)
    file, key = tmp_path / "b", Fernet.generate_key().decode()
    await backup._backup(place, file, key)
    whole = bytearray(gzip.decompress(file.read_bytes()))
    whole[whole.index(b"RunEvent/")] ^= 1
    (tmp_path / "damaged").write_bytes(gzip.compress(bytes(whole)))
    (tmp_path / "cut").write_bytes(file.read_bytes()[:300])
    (tmp_path / "foreign").write_bytes(b"nothing of ours")
    for name in ("damaged", "cut", "foreign"):
        with pytest.raises(errors.DigestMismatch):
            archive.read(tmp_path / name)
    with pytest.raises(errors.InvalidArgument, match="cannot be read"):
        archive.read(tmp_path / "none")
    with tarfile.open(tmp_path / "newer", "w:gz") as tar:
        (tmp_path / "manifest.json").write_text(json.dumps({"format": 2, "release": "9.0.0"}))
        tar.add(tmp_path / "manifest.json", "manifest.json")
    with pytest.raises(errors.InvalidArgument, match="has format 2") as refused:
        archive.read(tmp_path / "newer")
    assert "9.0.0" in refused.value.hint
    _, parts = archive.read(file)
    await wipe(control)
    with pytest.raises(errors.InvalidArgument, match="another key"):
        await restore._restore(place, parts, Fernet.generate_key().decode(), force=False)
    with pytest.raises(errors.InvalidArgument, match="no key for a backup"):
        await restore._restore(place, parts, "secret", force=False)
    assert not any((await everything(control)).values())


# --- rebuild ---


async def test_manifests_make_the_records_anew(control: Control, place: Installation) -> None:
    await commit(control)
    await control.store.put("projects/q/datasets/x/manifest.json", b"{damaged")
    made, planned = await rebuild._rebuild(place, dry_run=True)
    assert planned.written == {"projects": 1, "snapshots": 1, "datasets": 1, "scans": 3, "checkpoints": 3, "runs": 1}
    assert not any((await everything(control)).values())
    _, outcome = await rebuild._rebuild(place, dry_run=False)
    assert outcome.written == planned.written and made.unreadable == ["projects/q/datasets/x"]
    assert [(one.source, one.commit) for one in made.sources] == [(f"{P}/sources/git", "c0ffee")]

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

    _, again = await rebuild._rebuild(place, dry_run=False)
    assert not any(again.written.values()) and again.there == planned.written


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


def test_the_commands_work_on_the_installation_that_the_environment_names(
    place: Installation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, key = place.settings, tmp_path / "key"
    assert main(["credential", "new-key"]) == 0
    key.write_text(capsys.readouterr().out)
    for name, value in {
        "NATS_URL": settings.nats_url,
        "NATS_USER": settings.nats_user,
        "NATS_PASSWORD": settings.nats_password.get_secret_value(),
        "S3_ENDPOINT": settings.s3_endpoint,
        "S3_ACCESS_KEY": settings.s3_access_key.get_secret_value(),
        "S3_SECRET_KEY": settings.s3_secret_key.get_secret_value(),
        "S3_BUCKET": settings.s3_bucket,
    }.items():
        monkeypatch.setenv(f"CODEGRAFT_{name}", value)

    async def fill() -> None:
        store = installation.S3Store(installation.s3_address(settings))
        await store.prepare()
        store.close()
        async with installation.opened(place) as control:
            await wipe(control)
            await commit(control)

    asyncio.run(fill())
    assert main(["rebuild", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written"]["runs"] == 1
    file = str(tmp_path / "b.tar.gz")
    assert main(["backup", file, "--key-file", str(key), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"]["kv/trainer.jsonl"] == 9
    assert main(["backup", file]) == 2 and "exists" in capsys.readouterr().err
    assert main(["restore", file, "--key-file", str(key)]) == 4
    assert main(["restore", file, "--key-file", str(key), "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["missing_artifacts"] == []
    monkeypatch.setenv("CODEGRAFT_NATS_PASSWORD", "wrong")
    assert main(["rebuild"]) == 5
