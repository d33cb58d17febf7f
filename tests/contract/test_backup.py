"""Backup and restore of the control state, between real NATS servers over one real object store."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import tarfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from codegraft.common.v1.deleted_pb2 import DeletedProject
from codegraft.inference.v1.serving_pb2 import Serving
from codegraft.ingest.v1.project_pb2 import Project
from codegraft.ingest.v1.snapshot_pb2 import Snapshot, SnapshotManifest
from codegraft.scanner.v1.dataset_pb2 import Dataset, DatasetManifest
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest, Checkpoint
from codegraft.trainer.v1.run_pb2 import Run
from services.cli.control import archive, backup, installation, restore
from services.cli.control.installation import Control, Installation
from services.cli.main import main
from services.core import errors
from services.core.audit.nats import NatsAudit
from services.core.store import blobs
from tests.contract.control_fixtures import RUN, SNAPSHOT, P, commit, everything, live, table, wipe

pytest_plugins = "tests.contract.control_fixtures"
pytestmark = pytest.mark.usefixtures("own_logs")


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
    # Deleted since: services would let what comes back go once more.
    await table(control, "access", DeletedProject).create(DeletedProject(name=P))
    done = await restore._restore(place, parts, "", force=True)
    assert done.removed == 1 and not done.keys_left and await everything(control) == before
    assert await table(control, "access", DeletedProject).find(P) is None


async def test_objects_that_the_store_lost_are_told(control: Control, place: Installation, tmp_path: Path) -> None:
    await commit(control)
    await backup._backup(place, tmp_path / "b", "")
    _, parts = archive.read(tmp_path / "b")
    manifest = await control.artifacts.manifest(f"{RUN}/checkpoints/2", AdapterManifest)
    await control.store.delete(blobs.key(manifest.files[0].sha256))
    await control.store.delete(f"{SNAPSHOT}/manifest.json")
    done = await restore._restore(place, parts, "", force=False)
    assert done.missing == [f"{RUN}/checkpoints/2", SNAPSHOT]


# What each record names, by its type: the field, and the type of what it names.
NAMES: dict[type[Any], tuple[str, str]] = {
    Serving: ("wanted_checkpoint", "Checkpoint"),
    Run: ("dataset", "Dataset"),
    Dataset: ("snapshot", "Snapshot"),
}


async def work(control: Control, number: int) -> None:
    """What services do while a backup is taken: something from its snapshot to its policy, each once the one before it
    is there."""
    snapshot, dataset, run = f"{P}/snapshots/{number}", f"{P}/datasets/{number}", f"{P}/runs/{number}"
    checkpoint = f"{run}/checkpoints/1"
    await control.artifacts.commit(snapshot, SnapshotManifest(name=snapshot), {})
    await table(control, "ingest", Snapshot).create(Snapshot(name=snapshot))
    await control.artifacts.commit(dataset, DatasetManifest(name=dataset), {})
    await table(control, "scanner", Dataset).create(Dataset(name=dataset, snapshot=snapshot))
    await table(control, "trainer", Run).create(Run(name=run, dataset=dataset))
    await control.artifacts.commit(checkpoint, AdapterManifest(name=checkpoint), {})
    await table(control, "trainer", Checkpoint).create(Checkpoint(name=checkpoint))
    policy = Serving(name=f"projects/p{number}/serving", wanted_checkpoint=checkpoint)
    await table(control, "inference", Serving).create(policy)


def not_in(parts: Mapping[str, bytes]) -> set[str]:
    """What records in a backup name, and what of it the backup does not have: records, and artifacts."""
    records = {
        one.key: one.value for bucket in backup.BUCKETS for one in archive.records_of(parts[f"kv/{bucket}.jsonl"])
    }
    artifacts = {one.name for one in archive.artifacts_of(parts[archive.ARTIFACTS])}
    named: set[str] = set()
    for kind, (field, of) in NAMES.items():
        root = f"{kind.DESCRIPTOR.name}/"
        named |= {
            f"{of}/{getattr(kind.FromString(value), field)}" for key, value in records.items() if key.startswith(root)
        }
    stored = {key for key in (*records, *named) if key.startswith(("Snapshot/", "Dataset/", "Checkpoint/"))}
    return (named - records.keys()) | {key for key in stored if key.partition("/")[2] not in artifacts}


@pytest.mark.parametrize("order", ["as it is", "turned around"])
async def test_a_backup_under_load_holds_whatever_its_records_name(
    control: Control, place: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """Somebody makes something of everything between any two reads. Read in the other order it would be missed."""
    numbers = itertools.count()

    def disturbed(read: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def then(*arguments: Any) -> Any:
            found = await read(*arguments)
            await work(control, next(numbers))
            return found

        return then

    await work(control, next(numbers))
    for name in ("records_in", "artifacts_in"):
        monkeypatch.setattr(backup, name, disturbed(getattr(backup, name)))
    if order == "turned around":
        monkeypatch.setattr(backup, "BUCKETS", tuple(reversed(backup.BUCKETS)))
    await backup._backup(place, tmp_path / "b", "")
    contents, parts = archive.read(tmp_path / "b")
    assert sum(one.records for one in contents.parts) > 5 and next(numbers) == len(backup.BUCKETS) + 3
    missing = not_in(parts)
    if order == "as it is":
        assert not missing
    else:
        assert {one.partition("/")[0] for one in missing} == {"Snapshot", "Dataset", "Checkpoint"}


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
