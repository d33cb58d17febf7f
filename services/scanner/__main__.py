"""The scanner service: ``python -m services.scanner``."""

from __future__ import annotations

import services.scanner.allocators  # noqa: F401  # before Arrow is loaded and threads are started

# isort: split
import gc
import os
import secrets
import socket

from codegraft.common.v1.job_pb2 import JobState
from codegraft.event.v1.events_pb2 import ScanChanged
from codegraft.scanner.v1 import scan_pb2_grpc
from codegraft.scanner.v1.dataset_pb2 import Dataset
from codegraft.scanner.v1.scan_pb2 import Scan
from services.core import runtime
from services.core.auth import keyring
from services.core.errors import DatasetNotFound, ScanNotFound
from services.core.jobs import JobRunner
from services.core.jobs.announcer import announce
from services.core.jobs.parts import PartRunner
from services.core.jobs.workers import Workers
from services.core.leftovers import Leftovers
from services.core.quota.jobs import places
from services.core.quota.limits import Kind
from services.core.quota.usage import usage
from services.core.rpc.server import serve
from services.core.runtime import Runtime
from services.core.state import Table
from services.scanner import part_worker
from services.scanner.config import ScannerSettings
from services.scanner.leftovers import ScanLeftovers
from services.scanner.part_worker import PartWorker
from services.scanner.servicer import KIND, ScanServicer
from services.scanner.worker import ScanWorker

SERVICE = "codegraft.scanner.v1.ScanService"
CHANGED = "codegraft.scanner.scan.changed.v1"


async def main(settings: ScannerSettings) -> None:
    """Serves, and works on scans, until the process is told to stop."""
    os.nice(settings.scanner_nice)
    # What a scan finds out lives to its end, and is in no cycle: to look through it again and again costs a twelfth of
    # stage 1.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    async with Runtime.open("scanner", settings) as opened:
        state = opened.state("scanner")
        scans = Table(state, Scan, missing=ScanNotFound)
        datasets = Table(state, Dataset, missing=DatasetNotFound)
        worker = ScanWorker(opened, settings, scans, datasets)
        maker = PartWorker(opened, settings, scans)
        room = places(opened.quotas, Kind.SCANS, state, scans)
        me = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        runners = [
            JobRunner(KIND, scans, opened.jobs, worker.handle, worker_id=f"{me}-{number}", lease=settings.job_lease)
            for number in range(settings.scanner_workers)
        ]
        part_runners = [
            PartRunner(part_worker.KIND, opened.store, opened.jobs, maker.make, lease=settings.job_lease)
            for _ in range(2 * settings.scanner_workers)  # while one waits for the store, the other works
        ]
        workers = Workers(state, runners, settings.job_lease)
        await serve(
            settings,
            [
                (
                    scan_pb2_grpc.add_ScanServiceServicer_to_server,
                    ScanServicer(opened, settings, scans, datasets, room),
                    SERVICE,
                ),
                usage(opened.quotas, {Kind.SCANS: room.used}),
                workers.service(),
            ],
            keys=opened.state(keyring.BUCKET),
            audit=opened.audit,
            quotas=opened.quotas,
            background=[
                *(runner.run for runner in runners),
                workers.run,
                *(runner.run for runner in part_runners),
                lambda: announce(KIND, scans, opened.events, CHANGED, _changed),
                Leftovers(opened.state(keyring.BUCKET), ScanLeftovers(scans, datasets, opened.store).forget).run,
            ],
        )


def _changed(name: str, state: JobState) -> ScanChanged:
    return ScanChanged(scan=name, state=state)


if __name__ == "__main__":
    runtime.leave(runtime.run("scanner", ScannerSettings, main))
