"""An old client against today's services, and today's client against an old server."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from codegraft.common.v1.job_pb2 import JOB_STATE_SUCCEEDED
from codegraft.ingest.v1.project_pb2 import Project
from codegraft.scanner.v1 import scan_pb2_grpc
from codegraft.scanner.v1.dataset_pb2 import Dataset
from codegraft.scanner.v1.scan_pb2 import Scan
from codegraft.trainer.v1.run_pb2 import Run
from services.cli.main import main
from services.client import Addresses, Codegraft
from services.core import errors
from services.core.jobs import new_status
from services.core.quota.jobs import places
from services.core.quota.limits import Kind
from services.core.rpc.interceptors import CallInterceptor
from services.core.rpc.status import from_rpc
from services.core.runtime import Runtime
from services.core.state import Table
from services.ingest.assembly import Ingest
from services.ingest.config import IngestSettings
from services.scanner.config import ScannerSettings
from services.scanner.servicer import ScanServicer
from services.trainer.assembly import Trainer
from services.trainer.config import TrainerSettings
from tests.compat import old
from tests.rpcs import METHODS

pytest_plugins = ["tests.contract.inference_fixtures"]

P = "projects/acme"


def test_every_old_call_is_there_as_it_was() -> None:
    assert len(old.METHODS) > 30
    for name, method in old.METHODS.items():
        today = METHODS[name]
        assert (today.client_streaming, today.server_streaming) == (method.client_streaming, method.server_streaming)
        assert today.input_type.full_name == method.input_type.full_name
        assert today.output_type.full_name == method.output_type.full_name


# --- an old client ---


@pytest.fixture
async def channel(tmp_path: Path) -> AsyncIterator[tuple[grpc.aio.Channel, Runtime]]:
    """Today's ingest, scanner and trainer over fakes of NATS and the store."""
    runtime = Runtime.memory(tmp_path)
    ingest = Ingest(runtime, IngestSettings(cache_dir=tmp_path))
    state = runtime.state("scanner")
    scans, datasets = Table(state, Scan, missing=errors.ScanNotFound), Table(state, Dataset, missing=errors.NotFound)
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    trainer = Trainer(runtime, TrainerSettings(cache_dir=tmp_path, trainer_workers=0), newest=None)  # type: ignore[arg-type]
    for add, servicer, _ in (*ingest.services, *trainer.services):
        add(servicer, server)
    room = places(runtime.quotas, Kind.SCANS, state, scans)
    scanner = ScanServicer(runtime, ScannerSettings(), scans, datasets, room)
    scan_pb2_grpc.add_ScanServiceServicer_to_server(scanner, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    fetching = asyncio.create_task(ingest.fetcher.run())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
        yield opened, runtime
    fetching.cancel()
    await asyncio.gather(fetching, return_exceptions=True)
    await server.stop(None)


async def test_an_old_client_goes_from_a_file_to_a_scan(channel: tuple[grpc.aio.Channel, Runtime]) -> None:
    wire, _ = channel
    made = await old.call(wire, "ingest.v1.ProjectService/CreateProject")(
        old.message("ingest.v1.CreateProjectRequest", project_id="acme", project={"title": "Acme"}, request_id="one")
    )
    assert (made.project.name, made.project.title) == (P, "Acme") and made.project.etag
    data = b"print('hello')\n" * 30
    header = {"parent": P, "filename": "a.py", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    pieces = [
        old.message("ingest.v1.UploadContentRequest", header=header),
        old.message("ingest.v1.UploadContentRequest", chunk={"data": data}),
    ]
    upload = (await old.call(wire, "ingest.v1.UploadService/UploadContent")(iter(pieces))).upload
    source = old.message("ingest.v1.Source", file={"upload": upload.name, "path": "a.py"})
    created = await old.call(wire, "ingest.v1.SourceService/CreateSource")(
        old.message("ingest.v1.CreateSourceRequest", parent=P, source=source)
    )
    watch = old.message("ingest.v1.WatchSourceRequest", name=created.source.name)
    async for seen in old.call(wire, "ingest.v1.SourceService/WatchSource")(watch, timeout=20):
        if seen.source.content_digest:
            break
    snapshot = (
        await old.call(wire, "ingest.v1.SnapshotService/CreateSnapshot")(
            old.message("ingest.v1.CreateSnapshotRequest", parent=P)
        )
    ).snapshot
    assert snapshot.file_count == 1
    scan = (
        await old.call(wire, "scanner.v1.ScanService/CreateScan")(
            old.message(
                "scanner.v1.CreateScanRequest", parent=P, snapshot=snapshot.name, settings={"loss_filter": False}
            )
        )
    ).scan
    listed = await old.call(wire, "scanner.v1.ScanService/ListScans")(
        old.message("scanner.v1.ListScansRequest", parent=P)
    )
    assert [one.name for one in listed.scans] == [scan.name] and not scan.settings.loss_filter
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await old.call(wire, "scanner.v1.ScanService/GetScan")(
            old.message("scanner.v1.GetScanRequest", name=f"{P}/scans/none")
        )
    assert isinstance(from_rpc(caught.value), errors.ScanNotFound)


async def test_what_an_old_reader_does_not_know_is_kept_when_it_writes(
    channel: tuple[grpc.aio.Channel, Runtime],
) -> None:
    """An older replica changes a record in the middle of an upgrade: what the newer ones wrote stays."""
    wire, runtime = channel
    run = Run(name=f"{P}/runs/r", status=new_status(), previous_best_checkpoint=f"{P}/runs/r/checkpoints/1")
    await Table(runtime.state("trainer"), Run, missing=errors.RunNotFound).create(run)
    seen = (
        await old.call(wire, "trainer.v1.RunService/GetRun")(old.message("trainer.v1.GetRunRequest", name=run.name))
    ).run
    assert not hasattr(seen, "previous_best_checkpoint"), "the old contract is old enough to tell"
    seen.title = "changed by an old one"
    again = Run.FromString(seen.SerializeToString())
    assert (again.title, again.previous_best_checkpoint) == (seen.title, run.previous_best_checkpoint)
    project = Project(name=P, exclude_licenses=["GPL-3.0-only"])
    kept = Project.FromString(
        old.message("ingest.v1.Project").FromString(project.SerializeToString()).SerializeToString()
    )
    assert kept == project


async def test_an_old_client_completes_and_sets_what_serves(worlds: Callable[..., Any]) -> None:
    world = await worlds()
    best = await world.store(1, seed=1)
    async with grpc.aio.insecure_channel(world.address) as wire:
        served = await old.call(wire, "inference.v1.ServingService/SetServing")(
            old.message(
                "inference.v1.SetServingRequest",
                parent="projects/demo",
                mode="SERVING_MODE_PINNED",
                checkpoint=best.checkpoint,
            )
        )
        assert served.serving.wanted_sha256 == best.sha256
        request = old.message(
            "inference.v1.CompleteRequest",
            parent="projects/demo",
            prompt={"path": "a.py", "prefix": "def main():\n"},
            stop={"max_tokens": 6},
        )
        parts = [part async for part in old.call(wire, "inference.v1.CompletionService/Complete")(request, timeout=20)]
    kinds = [part.WhichOneof("part") for part in parts]
    assert kinds[0] == "started" and kinds[-1] == "finished" and "delta" in kinds
    assert parts[0].started.adapter_sha256 == best.sha256 and parts[-1].finished.usage.completion_tokens <= 6


# --- an old server ---


def answers() -> dict[str, Callable[[Any], Any]]:
    run = {"name": f"{P}/runs/r", "base_model": "tiny", "status": {"state": JOB_STATE_SUCCEEDED}}
    return {
        "ingest.v1.ProjectService/ListProjects": lambda _: old.message(
            "ingest.v1.ListProjectsResponse", projects=[{"name": P, "title": "Acme"}]
        ),
        "trainer.v1.RunService/GetRun": lambda _: old.message("trainer.v1.GetRunResponse", run=run),
        "inference.v1.ServingService/GetServing": lambda _: old.message(
            "inference.v1.GetServingResponse", serving={"name": f"{P}/serving", "mode": "SERVING_MODE_OFF"}
        ),
        "inference.v1.CompletionService/Complete": lambda request: [
            old.message("inference.v1.CompleteResponse", started={"model": "tiny"}),
            old.message("inference.v1.CompleteResponse", delta={"text": request.prompt.prefix.upper()}),
            old.message("inference.v1.CompleteResponse", finished={"reason": "FINISH_REASON_STOP"}),
        ],
    }


@pytest.fixture
def old_server() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((old.OldServer(answers()),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def test_todays_client_reads_what_an_old_server_says(old_server: str) -> None:
    with Codegraft(Addresses(old_server, old_server, old_server, old_server)) as client:
        assert [project.title for project in client.projects.list()] == ["Acme"]
        run = client.runs.get(f"{P}/runs/r")
        assert run.status.state == JOB_STATE_SUCCEEDED and not run.imported and not run.HasField("proof")
        assert not client.serving.get(P).serving.waiting_checkpoint
        assert "".join(piece.text for piece in client.completions.complete(P, prefix="say")) == "SAY"


def test_what_an_old_server_lacks_is_told_with_the_way_out(
    old_server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Codegraft(Addresses(old_server, old_server, old_server, old_server)) as client:
        with pytest.raises(errors.NotSupported) as caught:
            client.feedback.acceptance(P, timedelta(days=1))
        assert "older release" in caught.value.message and "Upgrade the service" in caught.value.hint
    for name in ("INGEST", "SCANNER", "TRAINER", "INFERENCE"):
        monkeypatch.setenv(f"CODEGRAFT_{name}_ADDRESS", old_server)
    assert main(["key", "list"]) == 1
    told = capsys.readouterr().err
    assert "older release" in told and "Upgrade the service" in told
