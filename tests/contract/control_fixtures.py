"""An installation's control state over real servers, which backup, restore and rebuild are tried on.

It comes with ``pytest_plugins``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from codegraft.access.v1.access_pb2 import StoredKey
from codegraft.access.v1.audit_pb2 import AuditRecord
from codegraft.inference.v1.serving_pb2 import SERVING_MODE_OFF, Serving
from codegraft.ingest.v1.credential_pb2 import StoredCredential
from codegraft.ingest.v1.project_pb2 import Project
from codegraft.ingest.v1.snapshot_pb2 import Snapshot, SnapshotManifest, SnapshotSource
from codegraft.scanner.v1.dataset_pb2 import Dataset, DatasetManifest, DatasetPart, VerdictsManifest
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest, Checkpoint
from codegraft.trainer.v1.run_event_pb2 import RunEvent
from codegraft.trainer.v1.run_pb2 import Run
from services.cli.control import backup, installation
from services.cli.control.installation import Control, Installation
from services.core import errors
from services.core.audit.nats import NatsAudit
from services.core.auth.keyring import BUCKET as KEYS
from services.core.jobs import new_status
from services.core.jobs.nats import NatsQueue
from services.core.state import Table
from services.core.store.s3 import S3Address
from services.trainer.records import Story
from tests.conftest import NatsServer, standing_on

P, RUN, DATASET, SNAPSHOT = "projects/p", "projects/p/runs/r", "projects/p/datasets/d", "projects/p/snapshots/s"


@pytest.fixture
def place(nats_of_file: NatsServer, s3_server: S3Address, tmp_path: Path, request: Any) -> Installation:
    return at(nats_of_file, s3_server, tmp_path, bucket=f"day-two-{abs(hash(request.node.name)) % 10**8}")


def at(nats: NatsServer, s3: S3Address, folder: Path, *, bucket: str) -> Installation:
    return Installation(standing_on(nats, s3, folder / "cache").model_copy(update={"s3_bucket": bucket}))


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
