"""A full disk is told as what it is, whoever met it."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from safetensors import SafetensorError

from codegraft.trainer.v1.run_pb2 import Run
from services.core import disk
from services.core.backoff import Backoff
from services.core.errors import DiskFull, RunNotFound
from services.core.jobs import JobContext, JobRunner, MemoryQueue, is_final, new_status
from services.core.state import MemoryState, Table
from services.ingest.arriving import Arriving

ROOM = 1 << 20
"""Bytes of a file on what these tests take for a full disk."""


@pytest.fixture
def small() -> Iterator[None]:
    """No file may become larger than ROOM."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("error", "folder"),
    [
        (OSError(errno.ENOSPC, "…", "/cache/models/x"), "/cache/models"),
        (OSError(errno.EDQUOT, "…"), tempfile.gettempdir()),
        (SafetensorError("I/O error: No space left on device (os error 28)"), tempfile.gettempdir()),
    ],
)
def test_the_error_names_the_folder_and_the_way_out(error: Exception, folder: str) -> None:
    told = disk.full(error)
    assert told is not None and told.metadata["folder"] == folder and folder in told.message
    assert "Free some space" in told.hint and not told.is_callers_fault


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(PermissionError), disk.writing(Path("/cache")):
        raise PermissionError(errno.EACCES, "…", "/cache/x")
    with pytest.raises(DiskFull, match="/elsewhere"), disk.writing(Path("/cache")):
        raise DiskFull.of("/elsewhere", "…")


def test_an_upload_keeps_what_found_room_and_goes_on_from_there(tmp_path: Path, small: None) -> None:
    path, content = tmp_path / "spool" / "x", os.urandom(3 * ROOM)
    arriving = Arriving(path, len(content), "")
    with pytest.raises(DiskFull, match=str(path.parent)):
        arriving.append(content)
    arriving.give_up()
    assert arriving.arrived == path.stat().st_size == ROOM and path.read_bytes() == content[:ROOM]
    assert Arriving(path, len(content), "").arrived == ROOM


async def test_a_job_that_finds_no_room_is_tried_again_and_then_says_why(tmp_path: Path) -> None:
    table, queue = Table(MemoryState(), Run, missing=RunNotFound), MemoryQueue()
    tries = []

    async def handler(context: JobContext[Run]) -> None:
        tries.append(context.epoch)
        raise OSError(errno.ENOSPC, "…", str(tmp_path / "x"))

    await table.create(Run(name="projects/p/runs/r", status=new_status()))
    await queue.submit("run", "projects/p/runs/r")
    soon = Backoff(first=timedelta(milliseconds=1), longest=timedelta(milliseconds=1))
    working = asyncio.create_task(JobRunner("run", table, queue, handler, worker_id="w", retry=soon).run())
    async with asyncio.timeout(10):
        async for run in table.watch("projects/p/runs/r"):
            if is_final(run.status):
                break
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    assert tries == [1, 2, 3] and run.status.failure.reason == "DISK_FULL"
    assert str(tmp_path) in run.status.failure.message and run.status.failure.hint
