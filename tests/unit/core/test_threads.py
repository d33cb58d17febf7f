"""A thread that the end of a process does not wait for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import pytest
import structlog

from services.core import log
from services.core.threads import apart

STUCK = """
import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from services.core.config import CoreSettings
from services.core.runtime import leave, run
from services.core.threads import apart

async def main(settings):
    stuck = asyncio.create_task(apart(lambda: time.sleep(60), "stuck"))
    pool = asyncio.get_running_loop().run_in_executor(ThreadPoolExecutor(1), time.sleep, 60)
    await asyncio.sleep(0.1)
    print("the last word")

leave(run("test", CoreSettings, main) or 3)
"""


async def test_what_it_returns_raises_and_is_bound_to() -> None:
    with log.bound(job="this one"):
        name, there = await apart(
            lambda: (threading.current_thread().name, structlog.contextvars.get_contextvars()), "loading"
        )
    assert (name, there) == ("loading", {"job": "this one"})
    with pytest.raises(KeyError, match="nothing"):
        await apart(lambda: {}["nothing"], "loading")


async def test_one_that_nobody_waits_for_any_more_tells_nobody() -> None:
    go_on = threading.Event()
    waiting = asyncio.create_task(apart(go_on.wait, "loading"))
    await asyncio.sleep(0)
    waiting.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting


def test_a_process_ends_while_its_threads_are_stuck() -> None:
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stdout) == (3, "the last word\n"), ended.stderr
    assert time.monotonic() - began < 40
