"""One scan, several scanner processes: the same bytes, whoever did it, whoever was killed, whatever came twice."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from codegraft.common.v1.job_pb2 import JOB_STATE_SUCCEEDED
from codegraft.ingest.v1.project_pb2 import Project
from codegraft.ingest.v1.source_pb2 import Source
from codegraft.scanner.v1.scan_pb2 import Scan, ScanSettings
from services.core import errors
from services.core.config import CoreSettings
from services.core.jobs import is_final, new_status
from services.core.jobs.parts import part_name
from services.core.runtime import Runtime
from services.core.state import Table
from services.core.store.s3 import S3Address
from services.ingest import snapshot
from services.ingest.contents import Contents
from services.ingest.files import FoundFile
from services.ingest.listing import EMPTY, Listing
from services.scanner import rules, worker
from services.scanner.part_worker import KIND
from tests.conftest import NatsServer
from tests.unit.inference import tiny

PROJECT = "projects/replicas"
FILES = {f"pkg{n % 7}/m{n}.py": f"def f{n}(x):\n    return x * {n} + {n % 9}\n".encode() * 2 for n in range(1030)}
FILES |= {"copy.py": FILES["pkg3/m3.py"], "words.md": b"# words\n"}
"""For stage 1 in three parts, and for stage 2 in many."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny.make_tokenizer()
    tiny.make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"dir:{folder}"


class Nursery:
    """Starts scanner processes without the seconds of importing torch each."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        assert process.stdin and process.stdout
        self._folder = folder
        self._asks, self._answers = process.stdin, process.stdout
        assert self._answers.readline() == "ready\n", "it ended"

    @contextmanager
    def scanners(self, count: int) -> Iterator[list[int]]:
        """The process ids of so many scanners; whoever kills one takes it out."""
        running = [self._start(number) for number in range(count)]
        try:
            yield running
        finally:
            for process in running:
                kill(process)

    def _start(self, number: int) -> int:
        first, own = (self._folder / f"cache-{each}/secrets" for each in (0, number))
        if number and not own.exists():
            shutil.copytree(first, own)  # the compiled rules, which take three seconds
        self._asks.write(f"{number}\n")
        self._asks.flush()
        return int(self._answers.readline())


def kill(process: int) -> None:
    """Returns when it is gone."""
    os.kill(process, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(process, 0)
            time.sleep(0.01)


@contextmanager
def nursery(settings: dict[str, str], folder: Path) -> Iterator[Nursery]:
    """Its scanners have their logs and caches in the folder, and end with it."""
    command = [sys.executable, str(Path(__file__).with_name("scanner_process.py"))]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, cwd=folder, text=True, env={**os.environ, **settings}
    ) as process:
        yield Nursery(process, folder)


@asynccontextmanager
async def desk(settings: dict[str, str], folder: Path) -> AsyncIterator[tuple[Runtime, Table[Scan], str]]:
    given = {name.removeprefix("CODEGRAFT_").lower(): value for name, value in settings.items()}
    known = {name: value for name, value in given.items() if name in CoreSettings.model_fields}
    core = CoreSettings(cache_dir=folder / "mine", **known)  # type: ignore[arg-type]
    async with Runtime.open("test", core) as runtime:
        contents = Contents(runtime.blobs, EMPTY, 1)
        await contents.add([FoundFile(path, data) for path, data in FILES.items()])
        await contents.finish()
        listed = Listing.of(contents.files)
        source = Source(name=f"{PROJECT}/sources/s")
        manifest, table = snapshot.build(PROJECT, [snapshot.Part(source, Project(name=PROJECT), listed)])
        await runtime.artifacts.commit(manifest.name, manifest, {"files.parquet": table})
        yield runtime, Table(runtime.state("scanner"), Scan, missing=errors.ScanNotFound), manifest.name


async def scanned(runtime: Runtime, scans: Table[Scan], taken: str, model: str, name: str) -> Scan:
    """Queues a scan with nothing in the cache and waits for its end."""
    async for key in runtime.store.list("losses/"):
        await runtime.store.delete(key)
    settings = rules.to_settings(rules.resolve(ScanSettings(max_loss=1000, min_tokens=4, model=model)))
    await scans.create(Scan(name=f"{PROJECT}/scans/{name}", snapshot=taken, settings=settings, status=new_status()))
    await runtime.jobs.submit("scan", f"{PROJECT}/scans/{name}")
    async with asyncio.timeout(120):
        async for scan in scans.watch(f"{PROJECT}/scans/{name}"):
            if is_final(scan.status):
                return scan
    raise AssertionError("unreachable")


async def _two_parts(runtime: Runtime, prefix: str) -> None:
    async with asyncio.timeout(60):
        while len([key async for key in runtime.store.list(prefix)]) < 2:  # noqa: ASYNC110  the store tells nobody
            await asyncio.sleep(0.05)


async def test_replicas_kills_and_repeats_change_no_byte(
    nats_server: NatsServer, s3_server: S3Address, model: str, tmp_path: Path
) -> None:
    settings = {
        "CODEGRAFT_NATS_URL": nats_server.url,
        "CODEGRAFT_NATS_USER": nats_server.user,
        "CODEGRAFT_NATS_PASSWORD": nats_server.password,
        "CODEGRAFT_S3_ENDPOINT": s3_server.endpoint,
        "CODEGRAFT_S3_ACCESS_KEY": s3_server.access_key,
        "CODEGRAFT_S3_SECRET_KEY": s3_server.secret_key,
        "CODEGRAFT_S3_BUCKET": s3_server.bucket,
        "CODEGRAFT_SCANNER_PART_TOKENS": "4000",
        "CODEGRAFT_SCANNER_DEVICE": "cpu",
        "CODEGRAFT_SCANNER_THREADS": "1",
        "CODEGRAFT_JOB_LEASE_SECONDS": "8",  # the others wait so long for the one that is killed
    }
    digests = []
    with nursery(settings, tmp_path) as processes:
        async with desk(settings, tmp_path) as (runtime, scans, taken):
            for name, count in (("alone", 1), ("two", 2), ("killed", 4)):
                with processes.scanners(count) as running:
                    scanning = asyncio.create_task(scanned(runtime, scans, taken, model, name))
                    if name == "killed":
                        prefix = f"{PROJECT}/scans/{name}/parts/measure-"
                        await _two_parts(runtime, prefix)
                        kill(running.pop(0))
                        for index in range(4):  # whoever has them, and whether they are made or not
                            await runtime.jobs.submit(KIND, part_name(f"{PROJECT}/scans/{name}", "measure", index))
                    scan = await scanning
                assert scan.status.state == JOB_STATE_SUCCEEDED, scan.status.failure
                assert (scan.report.file_count, scan.report.cached_losses) == (len(FILES), 0)
                log = await worker.verdicts_file(runtime, scan.name)
                digests.append((hashlib.sha256(log.read_bytes()).hexdigest(), scan.dataset))
                assert not [key async for key in runtime.store.list(f"{scan.name}/parts/")]
    assert len(set(digests)) == 1, digests
