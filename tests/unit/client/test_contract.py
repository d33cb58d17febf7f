"""The client has a method for every RPC, and the blocking half is the asynchronous one."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pool

from codegraft.access.v1 import access_pb2, quota_pb2
from codegraft.inference.v1 import completion_pb2, serving_pb2
from codegraft.inference.v1.feedback_pb2 import FEEDBACK_EVENT_SHOWN
from codegraft.ingest.v1 import credential_pb2, project_pb2, source_pb2
from codegraft.trainer.v1.adapter_pb2 import DownloadCheckpointResponse, DownloadHeader
from services.client import AsyncCodegraft, Codegraft, make_blocking

SERVICES = [
    "ingest.v1.ProjectService", "ingest.v1.SourceService", "ingest.v1.UploadService", "ingest.v1.SnapshotService",
    "ingest.v1.CredentialService",
    "scanner.v1.ScanService", "trainer.v1.RunService", "trainer.v1.ModelService", "trainer.v1.AdapterService",
    "inference.v1.CompletionService", "inference.v1.ServingService", "inference.v1.FeedbackService",
    "access.v1.AccessService", "access.v1.AuditService", "access.v1.QuotaService", "access.v1.UsageService",
    "access.v1.WorkerService",
]  # fmt: skip
P, S, R = "projects/p", "projects/p/scans/s", "projects/p/runs/r"
ADAPTER = Path(tempfile.mkdtemp())
for name in ("adapter_model.safetensors", "adapter_config.json"):
    (ADAPTER / name).write_text("x")
MODE = serving_pb2.ServingMode.SERVING_MODE_OFF

CALLS: list[Callable[[Any], Any]] = [
    lambda c: c.projects.create("p"),
    lambda c: c.projects.get("p"),
    lambda c: c.projects.update(project_pb2.Project(name=P)),
    lambda c: c.projects.delete("p"),
    lambda c: c.sources.add("p", source_pb2.Source(), source_id="s"),
    lambda c: c.sources.get(f"{P}/sources/s"),
    lambda c: c.sources.update(source_pb2.Source(name=f"{P}/sources/s")),
    lambda c: c.sources.sync(f"{P}/sources/s"),
    lambda c: c.sources.remove(f"{P}/sources/s"),
    lambda c: c.sources.forget(f"{P}/sources/s"),
    lambda c: c.sources.upload("p", b"bytes"),
    lambda c: c.credentials.create_token("p", "t"),
    lambda c: c.credentials.get(f"{P}/credentials/c"),
    lambda c: c.credentials.update(credential_pb2.Credential(name=f"{P}/credentials/c")),
    lambda c: c.credentials.delete(f"{P}/credentials/c"),
    lambda c: c.snapshots.create("p"),
    lambda c: c.snapshots.get(f"{P}/snapshots/latest"),
    lambda c: c.snapshots.delete(f"{P}/snapshots/0"),
    lambda c: c.scans.create("p", f"{P}/snapshots/0"),
    lambda c: c.scans.get(S),
    lambda c: c.scans.cancel(S),
    lambda c: c.datasets.get(f"{P}/datasets/latest"),
    lambda c: c.runs.plan("p"),
    lambda c: c.runs.create("p"),
    lambda c: c.runs.get(R),
    lambda c: c.runs.cancel(R),
    lambda c: c.runs.pause(R),
    lambda c: c.runs.resume(R),
    lambda c: c.runs.keep(f"{R}/checkpoints/best"),
    lambda c: c.runs.checkpoint(f"{R}/checkpoints/best"),
    lambda c: c.runs.best("p"),
    lambda c: c.adapters.download(f"{R}/checkpoints/1", Path(tempfile.mkdtemp()) / "to"),
    lambda c: c.adapters.upload("p", ADAPTER),
    lambda c: c.models.get("smollm2-135m"),
    lambda c: c.models.push(ADAPTER, "m"),
    lambda c: c.completions.score("p", "x", prefix="y"),
    lambda c: c.serving.set("p", MODE),
    lambda c: c.serving.get("p"),
    lambda c: c.serving.approve("p", f"{R}/checkpoints/1"),
    lambda c: c.serving.load(f"{R}/checkpoints/1"),
    lambda c: c.serving.unload(f"{R}/checkpoints/1"),
    lambda c: c.keys.create(access_pb2.ROLE_READER, projects=["p"]),
    lambda c: c.keys.rotate("k"),
    lambda c: c.keys.revoke("k"),
    lambda c: c.keys.whoami(),
    lambda c: c.quotas.get(P),
    lambda c: c.quotas.set(P, quota_pb2.Limits()),
    lambda c: c.quotas.usage(P),
    lambda c: c.quotas.stored(P),
    lambda c: c.feedback.record("p", "id", FEEDBACK_EVENT_SHOWN),
    lambda c: c.feedback.acceptance("p", timedelta(days=1)),
    lambda c: c.feedback.delete_kept("p"),
]
ITERATIONS: list[Callable[[Any], Any]] = [
    lambda c: c.projects.list(),
    lambda c: c.feedback.kept("p"),
    lambda c: c.sources.list("p"),
    lambda c: c.sources.watch(f"{P}/sources/s"),
    lambda c: c.sources.watch_all("p"),
    lambda c: c.snapshots.list("p"),
    lambda c: c.snapshots.files(f"{P}/snapshots/0"),
    lambda c: c.snapshots.diff(f"{P}/snapshots/0", f"{P}/snapshots/1"),
    lambda c: c.snapshots.collect_garbage(),
    lambda c: c.credentials.list("p"),
    lambda c: c.scans.list("p"),
    lambda c: c.scans.watch(S),
    lambda c: c.scans.watch_all("p"),
    lambda c: c.scans.verdicts(S),
    lambda c: c.datasets.list("p"),
    lambda c: c.runs.list("p"),
    lambda c: c.runs.watch(R),
    lambda c: c.runs.watch_all("p"),
    lambda c: c.runs.checkpoints(R),
    lambda c: c.models.list(),
    lambda c: c.completions.complete("p", prefix="x"),
    lambda c: c.completions.chat("p", [completion_pb2.ChatMessage()]),
    lambda c: c.completions.models(),
    lambda c: c.serving.watch("p"),
    lambda c: c.serving.adapters(),
    lambda c: c.keys.list(),
    lambda c: c.audit.list(),
    lambda c: c.workers.list(),
]


async def test_every_rpc_of_the_contract_has_its_method(codegraft: Any, fake: Any) -> None:
    fake.scripts["DownloadCheckpoint"] = [[DownloadCheckpointResponse(header=DownloadHeader())]]
    for use in CALLS:
        await codegraft.call(use)
    for use in ITERATIONS:
        await codegraft.take(use)
    pool = descriptor_pool.Default()
    wanted = {method.name for name in SERVICES for method in pool.FindServiceByName(f"codegraft.{name}").methods}
    assert set(fake.requests) == wanted


def test_the_blocking_client_is_what_make_blocking_makes() -> None:
    made = make_blocking.make()
    stale = [path.name for path, text in made.items() if path.read_text() != text]
    assert not stale, "run: python -m services.client.make_blocking"
    assert {path.name for path in (make_blocking.HERE / "blocking").glob("*.py")} == {path.name for path in made}


GROUPS = [
    "projects",
    "sources",
    "credentials",
    "snapshots",
    "scans",
    "datasets",
    "runs",
    "adapters",
    "models",
    "completions",
    "serving",
    "keys",
    "audit",
    "quotas",
    "feedback",
    "workers",
]


@pytest.mark.parametrize("group", GROUPS)
async def test_both_halves_have_the_same_methods_with_the_same_parameters(address: str, group: str) -> None:
    from services.client import Addresses

    addresses = Addresses(address, address, address, address)
    with Codegraft(addresses) as blocking:
        async with AsyncCodegraft(addresses) as asynchronous:
            one, other = getattr(blocking, group), getattr(asynchronous, group)

            def methods(of: object) -> dict[str, list[str]]:
                return {
                    name: list(inspect.signature(method).parameters)
                    for name, method in inspect.getmembers(of, inspect.ismethod)
                    if not name.startswith("_")
                }

            assert methods(one) == methods(other) != {}
            assert not any(inspect.iscoroutinefunction(getattr(one, name)) for name in methods(one))
            assert all(getattr(one, name).__doc__ for name in methods(one))


def test_the_client_needs_only_grpc_and_protobuf() -> None:
    """A backend that imports it gets none of what the services stand on, even when that is not installed."""
    heavy = [
        "torch",
        "nats",
        "minio",
        "transformers",
        "pyarrow",
        "structlog",
        "pydantic",
        "pydantic_settings",
        "urllib3",
    ]
    program = (
        "import sys\n"
        f"heavy = {heavy}\n"
        "sys.modules.update(dict.fromkeys(heavy))\n"  # makes their import fail
        "from services.client import Codegraft, AsyncCodegraft, Addresses\n"
        "Codegraft(Addresses('localhost:1', 'localhost:1', 'localhost:1', 'localhost:1')).close()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
