"""Scans that are disturbed: cancelled in the middle, handed over to another worker, files that cannot be read."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from codegraft.common.v1.job_pb2 import JOB_STATE_CANCELLED, JOB_STATE_QUEUED, JOB_STATE_RUNNING, JOB_STATE_SUCCEEDED
from codegraft.event.v1.events_pb2 import ScanChanged
from codegraft.ingest.v1.project_pb2 import Project
from codegraft.ingest.v1.source_pb2 import Source
from codegraft.scanner.v1.dataset_pb2 import Dataset, DatasetManifest
from codegraft.scanner.v1.scan_pb2 import SECRET_POLICY_REDACT, Scan, ScanSettings
from services.core import errors
from services.core.backoff import Backoff
from services.core.events import Event
from services.core.jobs import JobRunner, is_final, new_status, request_cancel
from services.core.jobs.announcer import announce
from services.core.jobs.parts import PartRunner
from services.core.models import catalogue, weights
from services.core.runtime import Runtime
from services.core.state import Table
from services.core.store import blobs
from services.ingest import snapshot
from services.ingest.listing import Listing
from services.scanner import __main__ as service
from services.scanner import worker as worker_module
from services.scanner.config import ScannerSettings
from services.scanner.loss import FileLoss
from services.scanner.meter import Meter
from services.scanner.part_worker import PartWorker
from services.scanner.rules import Rules
from services.scanner.worker import ScanWorker, stored_verdicts
from tests import published
from tests.contents import stored

SCAN = "projects/demo/scans/one"


class FakeMeter(Meter):
    """Measures as many files as it is allowed to, then waits until it is told to stop."""

    def __init__(self, allowed: int) -> None:
        super().__init__(ScannerSettings())
        self.allowed = allowed
        self.measured: list[str] = []
        self.texts: list[str] = []
        self.left = False

    async def measure(
        self, folder: Path, rules: Rules, files: Sequence[tuple[str, str]], stop: threading.Event
    ) -> list[tuple[str, FileLoss]]:
        try:
            while len(self.measured) + len(files) > self.allowed:
                await asyncio.sleep(0.02)
                if stop.is_set():
                    raise errors.JobCancelled("told to stop")
        finally:
            self.left = True
        assert all(text for _, text in files)
        self.texts += [text for _, text in files]
        self.measured += [sha256 for sha256, _ in files]
        return [(sha256, FileLoss(1.0, 50, 50)) for sha256, _ in files]


@pytest.fixture
async def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A runtime with a queued scan of ten files, and a model that is only a name."""
    monkeypatch.setattr(weights, "ensure_weights", lambda _spec, _cache: tmp_path)
    monkeypatch.setattr(weights, "base_digest", lambda _folder: "d" * 64)
    monkeypatch.setattr(worker_module, "FLUSH_SECONDS", 0.0)
    runtime = Runtime.memory(tmp_path)
    files = {f"m{number}.py": f"def f{number}(x):\n    return x + {number}\n".encode() for number in range(10)}
    listed = await stored(runtime.blobs, files)
    manifest, table = snapshot.build(
        "projects/demo", [snapshot.Part(Source(name="projects/demo/sources/s"), Project(), listed)]
    )
    await runtime.artifacts.commit(manifest.name, manifest, {"files.parquet": table})
    scans = Table(runtime.state("scanner"), Scan, missing=errors.ScanNotFound)
    await scans.create(
        Scan(
            name=SCAN,
            snapshot=manifest.name,
            settings=ScanSettings(model=catalogue.DEFAULT_MODEL),
            status=new_status(),
        )
    )
    return SimpleNamespace(runtime=runtime, scans=scans, lost=next(iter(listed)).content)


@contextlib.asynccontextmanager
async def working(desk: SimpleNamespace, meter: Meter, name: str = "w") -> AsyncIterator[None]:
    datasets = Table(desk.runtime.state("scanner"), Dataset, missing=errors.DatasetNotFound)
    settings = ScannerSettings(scanner_part_tokens=1)  # every file is a part of its own
    handler = ScanWorker(desk.runtime, settings, desk.scans, datasets).handle
    maker = PartWorker(desk.runtime, settings, desk.scans, meter)
    runner = JobRunner("scan", desk.scans, desk.runtime.jobs, handler, worker_id=name, retry=Backoff())
    parts = PartRunner("scan-part", desk.runtime.store, desk.runtime.jobs, maker.make, retry=Backoff())
    tasks = [asyncio.create_task(runner.run()), asyncio.create_task(parts.run())]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    published.check("scanner", [desk.runtime.events])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  what is waited for is a plain value
            await asyncio.sleep(0.02)


async def ended(desk: SimpleNamespace, name: str = SCAN) -> Scan:
    async with asyncio.timeout(20):
        async for scan in desk.scans.watch(name):
            if is_final(scan.status):
                found: Scan = scan
                return found
    raise AssertionError("unreachable")


async def test_a_cancelled_scan_stops_within_a_second(desk: SimpleNamespace) -> None:
    """The best of some, as the machine may stand still itself."""
    first, took = await desk.scans.get(SCAN), []
    for number in range(3):
        name = SCAN if not number else f"{SCAN}-{number}"
        if number:
            again = Scan(name=name, snapshot=first.snapshot, settings=first.settings, status=new_status())
            await desk.scans.create(again)
        meter = FakeMeter(allowed=3)
        async with working(desk, meter):
            await until(lambda meter=meter: len(meter.measured) == 3)  # type: ignore[misc]
            asked = time.monotonic()
            await desk.scans.mutate(name, lambda scan: request_cancel(scan.status))
            scan = await ended(desk, name)
            took.append(time.monotonic() - asked)
            assert scan.status.state == JOB_STATE_CANCELLED
        assert meter.left, "the measuring thread was told to stop"
        if took[-1] < 1:
            break
    assert min(took) < 1, took


async def test_another_worker_goes_on_where_the_first_stopped(desk: SimpleNamespace) -> None:
    first, second = FakeMeter(allowed=6), FakeMeter(allowed=100)
    async with working(desk, first, "first"):
        await until(lambda: len(first.measured) == 6)
        await until(lambda: sum("/parts/measure-" in key for key in desk.runtime.store.data) == 6)
    assert (await desk.scans.get(SCAN)).status.state == JOB_STATE_QUEUED
    async with working(desk, second, "second"):
        scan = await ended(desk)
    assert scan.status.state == JOB_STATE_SUCCEEDED and scan.report.accepted_count == 10
    assert len(second.measured) == 4 and not set(first.measured) & set(second.measured)
    assert not [key for key in desk.runtime.store.data if "/parts/" in key], "nothing is left of the parts"


async def test_a_file_whose_blob_is_gone_is_rejected_and_the_rest_goes_on(desk: SimpleNamespace) -> None:
    await desk.runtime.store.delete(blobs.key(desk.lost.place.pack))
    async with working(desk, FakeMeter(allowed=100)):
        scan = await ended(desk)
    assert (scan.report.accepted_count, scan.report.rejected_count) == (9, 1)
    [verdict] = [row for row in await stored_verdicts(desk.runtime, SCAN) if not row.accepted]
    assert (verdict.sha256, verdict.reason) == (desk.lost.sha256, "LINGUIST_ERROR")


async def test_a_file_that_is_not_what_the_snapshot_says_is_rejected(desk: SimpleNamespace) -> None:
    listed = list(await stored(desk.runtime.blobs, {"a.py": b"print(1 + 1)\n" * 9, "b.py": b"print(2 + 2)\n" * 9}))
    listed[0] = replace(listed[0], content=replace(listed[0].content, sha256="0" * 64))
    manifest, table = snapshot.build(
        "projects/demo", [snapshot.Part(Source(name="projects/demo/sources/s"), Project(), Listing.of(listed))]
    )
    await desk.runtime.artifacts.commit(manifest.name, manifest, {"files.parquet": table})

    def take(scan: Scan) -> None:
        scan.snapshot, scan.settings.loss_filter = manifest.name, False

    await desk.scans.mutate(SCAN, take)
    async with working(desk, FakeMeter(allowed=100)):
        await ended(desk)
    reasons = {row.path: row.reason for row in await stored_verdicts(desk.runtime, SCAN)}
    assert reasons == {"a.py": "LINGUIST_ERROR", "b.py": "ACCEPTED"}


async def test_progress_counts_tokens_and_names_files(desk: SimpleNamespace) -> None:
    meter = FakeMeter(allowed=5)
    async with working(desk, meter):
        async with asyncio.timeout(10):
            async for scan in desk.scans.watch(SCAN):
                if scan.status.progress.done == 250:
                    break
        progress = scan.status.progress
        assert (progress.unit, progress.message) == ("tokens", "stage 2: 5 of 10 files")
        assert progress.total == pytest.approx(500, rel=0.1), "the rest is estimated by what was read"


async def test_every_state_is_announced_once(desk: SimpleNamespace) -> None:
    announcers = [
        asyncio.create_task(announce("scan", desk.scans, desk.runtime.events, service.CHANGED, service._changed))
        for _ in range(2)
    ]
    try:
        async with working(desk, FakeMeter(allowed=100)):
            scan = await ended(desk)
        published = desk.runtime.events.published
        await until(lambda: any(event.unpack(ScanChanged).state == JOB_STATE_SUCCEEDED for event in changes(published)))
        states = [event.unpack(ScanChanged).state for event in changes(published)]
        # Quick changes may be joined; none comes twice or out of order.
        assert states == sorted(set(states)) and set(states) <= {
            JOB_STATE_QUEUED,
            JOB_STATE_RUNNING,
            JOB_STATE_SUCCEEDED,
        }
        made = [event for event in published if event.type == "codegraft.scanner.dataset.created.v1"]
        assert [event.subject for event in made] == [scan.dataset]
    finally:
        for task in announcers:
            task.cancel()
        await asyncio.gather(*announcers, return_exceptions=True)


def changes(published: Sequence[Event]) -> list[Event]:
    return [event for event in published if event.type == "codegraft.scanner.scan.changed.v1"]


async def test_a_redacted_secret_reaches_neither_model_nor_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "glp" + "at-" + "Zq7Lw2Xk9Rt4Vb6Nm1Pc"
    files = {
        "a.py": f'TOKEN = "{token}"\n\n\ndef ask(server):\n    return server.get(TOKEN)\n'.encode(),
        "b.py": b"def area(width, height):\n    return width * height\n",
    }
    monkeypatch.setattr(weights, "ensure_weights", lambda _spec, _cache: tmp_path)
    monkeypatch.setattr(weights, "base_digest", lambda _folder: "d" * 64)
    runtime = Runtime.memory(tmp_path)
    listed = await stored(runtime.blobs, files)
    manifest, table = snapshot.build(
        "projects/demo", [snapshot.Part(Source(name="projects/demo/sources/s"), Project(), listed)]
    )
    await runtime.artifacts.commit(manifest.name, manifest, {"files.parquet": table})
    scans = Table(runtime.state("scanner"), Scan, missing=errors.ScanNotFound)
    await scans.create(
        Scan(
            name=SCAN,
            snapshot=manifest.name,
            settings=ScanSettings(model=catalogue.DEFAULT_MODEL, secrets=SECRET_POLICY_REDACT),
            status=new_status(),
        )
    )
    desk = SimpleNamespace(runtime=runtime, scans=scans)
    meter = FakeMeter(allowed=10)
    async with working(desk, meter):
        scan = await ended(desk)
    assert scan.status.state == JOB_STATE_SUCCEEDED, scan.status
    made = await runtime.artifacts.manifest(scan.dataset, DatasetManifest)
    folder = await runtime.artifacts.fetch(scan.dataset, made.files)
    texts = {row["path"]: row["text"] for row in pq.read_table(folder).to_pylist()}
    assert texts["a.py"] == files["a.py"].decode().replace(token, "<redacted:gitlab-pat>")
    assert texts["b.py"] == files["b.py"].decode()
    assert sorted(meter.texts) == sorted(texts.values())
    rejected = await stored_verdicts(runtime, SCAN)
    assert [row.detail for row in rejected] == ["redacted: gitlab-pat in line 1", ""]
