"""Anything may be killed at any moment: what was acknowledged stays, every job ends, and nothing happens twice.

``CHAOS_SECONDS=600 CHAOS_SEED=… CHAOS_REPORT=folder`` makes it the long test (`make chaos`), which keeps its table; the
short one is part of every test run.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path

import pytest

from services.client.aio.client import AsyncCodegraft
from tests.chaos.audit import Auditor
from tests.chaos.faults import Troublemaker
from tests.chaos.ledger import Ledger
from tests.chaos.load import Person, edit
from tests.chaos.report import Report
from tests.chaos.stack import WholeStack

SECONDS = float(os.environ.get("CHAOS_SECONDS", "0"))
SEED = int(os.environ.get("CHAOS_SEED") or random.randrange(2**32))
REPORT = os.environ.get("CHAOS_REPORT", "")
END = 180.0
"""Seconds within which all that was begun ends once the faults are over."""


@pytest.mark.timeout(SECONDS + 400)
async def test_killed_at_random_it_keeps_its_promises(stack: WholeStack, client: AsyncCodegraft) -> None:
    print(f"CHAOS_SEED={SEED}")
    rng, ledger, enough = random.Random(SEED), Ledger(), asyncio.Event()
    people = [Person(client, ledger, random.Random(SEED + number), f"person-{SEED}-{number}") for number in range(2)]
    project = await people[0].create(f"editors-{SEED}")
    trouble = Troublemaker(stack, client, ledger, rng, project)
    began, took, auditor = time.monotonic(), 0.0, None
    try:
        async with asyncio.timeout(SECONDS + END), asyncio.TaskGroup() as tasks:
            for person in people:
                tasks.create_task(person.work(enough) if SECONDS else person.project(person.name))
            for _ in range(2):
                tasks.create_task(edit(client, ledger, project, enough))
            await (trouble.work(SECONDS) if SECONDS else trouble.kill_each())
            took = time.monotonic() - began
            enough.set()
        assert ledger.completions, ledger.broken
        async with Auditor.of(stack, client, ledger) as auditor:
            await auditor.all()
    finally:  # what was measured is told, however it ends
        looked_at, lost = (auditor.looked_at, auditor.lost) if auditor else ({}, [])
        report = Report.of(SEED, took, trouble.faults, ledger, looked_at, lost)
        print(report.table())
        if REPORT:
            report.keep(Path(REPORT))
