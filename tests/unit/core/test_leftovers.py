"""Deleted projects: every service lets go what it keeps of them, also late, and nothing of their successors."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta

import pytest

from codegraft.common.v1.job_pb2 import JOB_STATE_CANCELLED, JOB_STATE_RUNNING, JOB_STATE_SUCCEEDED, JobState
from codegraft.ingest.v1.project_pb2 import Project
from codegraft.ingest.v1.source_pb2 import Source
from codegraft.scanner.v1.dataset_pb2 import Dataset
from codegraft.scanner.v1.scan_pb2 import Scan
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest, Checkpoint
from codegraft.trainer.v1.run_event_pb2 import RunEvent
from codegraft.trainer.v1.run_pb2 import Run
from services.core import leftovers
from services.core.auth.keyring import BUCKET
from services.core.backoff import Backoff
from services.core.errors import DatasetNotFound, ScanNotFound, StoreUnavailable
from services.core.leftovers import Leftovers, deleted_projects
from services.core.runtime import Runtime
from services.core.state import Table
from services.ingest import records
from services.ingest.deletions import Deletions
from services.scanner.leftovers import ScanLeftovers
from services.trainer.leftovers import RunLeftovers
from services.trainer.records import Tables

P, OTHER = "projects/p", "projects/p-2"
LONG_AGO = 1_700_000_000


class House:
    """What ingest, scanner and trainer keep, with one state and one store."""

    def __init__(self) -> None:
        self.runtime = Runtime.memory()
        self.ingest = records.Tables.of(self.runtime.state("ingest"))
        self.deletions = Deletions(self.runtime, self.ingest)
        self.trainer = Tables.of(self.runtime.state("trainer"))
        scanner = self.runtime.state("scanner")
        self.scans = Table(scanner, Scan, missing=ScanNotFound)
        self.datasets = Table(scanner, Dataset, missing=DatasetNotFound)
        self.store = self.runtime.store

    async def fill(
        self, project: str, when: int = LONG_AGO, state: JobState = JOB_STATE_SUCCEEDED, id: str = "1"
    ) -> None:
        """With one of each, made at that moment (seconds since 1970)."""
        run, scan, dataset = f"{project}/runs/{id}", f"{project}/scans/{id}", f"{project}/datasets/{id}"
        for job, table in ((Run(name=run), self.trainer.runs), (Scan(name=scan), self.scans)):
            job.status.state = state
            job.status.create_time.FromSeconds(when)
            await table.create(job)  # type: ignore[arg-type]
        await self.trainer.checkpoints.create(Checkpoint(name=f"{run}/checkpoints/8"))
        await self.trainer.story.write(run, RunEvent(sequence=1), 1)
        record = Dataset(name=dataset)
        record.create_time.FromSeconds(when)
        await self.datasets.create(record)
        for name in (f"{run}/checkpoints/8", dataset, scan):
            await self.runtime.artifacts.commit(name, AdapterManifest(name=name), {"one": name.encode()})

    async def left(self, project: str) -> set[str]:
        """All that names the project, in state and store."""
        found = {key async for key in self.store.list(f"{project}/")}
        for bucket in ("ingest", "scanner", "trainer"):
            found |= {key for key in await self.runtime.state(bucket).keys() if f"/{project}/" in f"{key}/"}
        return found

    @contextlib.asynccontextmanager
    async def services(self) -> AsyncIterator[None]:
        """Two replicas of each."""
        state = self.runtime.state(BUCKET)
        runs = RunLeftovers(self.trainer, self.store).forget
        scans = ScanLeftovers(self.scans, self.datasets, self.store).forget
        tasks = [asyncio.create_task(Leftovers(state, forget).run()) for forget in (runs, scans) * 2]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def delete(self, project: str) -> None:
        """As DeleteProject does."""
        async with self.deletions.deleting(project):
            await self.ingest.projects.delete(project)

    async def create(self, project: str, when: float) -> None:
        """As CreateProject does."""
        made = Project(name=project)
        made.create_time.FromNanoseconds(int(when * 1e9))
        await self.deletions.begins(made)
        await self.ingest.projects.create(made)


@pytest.fixture
async def house(monkeypatch: pytest.MonkeyPatch) -> House:
    soon = timedelta(milliseconds=10)
    monkeypatch.setattr(leftovers, "_WAITS", Backoff(first=soon, longest=soon))
    made = House()
    for project in (P, OTHER):
        await made.create(project, LONG_AGO)
        await made.fill(project)
    return made


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(5):
        while not await true():  # noqa: ASYNC110  # as an operator sees it
            await asyncio.sleep(0.005)


async def test_nothing_is_left_of_a_deleted_project_and_all_of_the_others(house: House) -> None:
    before = await house.left(OTHER)
    await house.ingest.sources.create(Source(name=f"{P}/sources/s"))
    await house.store.put(f"{P}/snapshots/s/manifest.json", b"{}")
    async with house.services():
        assert await house.left(P)
        await house.delete(P)
        await until(lambda: gone(house, P))
    assert await house.left(OTHER) == before and len(before) == 9
    assert [each.name for each in await deleted_projects(house.runtime.state(BUCKET)).all()] == [P]


async def gone(house: House, project: str) -> bool:
    return not await house.left(project)


async def test_a_service_that_was_away_lets_the_old_go_and_nothing_of_the_successor(house: House) -> None:
    await house.delete(P)
    now = time.time()
    await house.create(P, now)
    await house.fill(P, int(now), id="new")
    async with house.services():
        await until(lambda: lacks(house, f"{P}/datasets/1", f"{P}/runs/1", f"{P}/scans/1"))
        await asyncio.sleep(0.05)
    found = await house.left(P)
    assert len(found) == 9 and all("/new" in each or each == f"Project/{P}" for each in found), found


async def lacks(house: House, *names: str) -> bool:
    return not any(name in each for each in await house.left(P) for name in names)


async def test_jobs_that_run_are_stopped_before_they_go(house: House) -> None:
    await house.fill(P, state=JOB_STATE_RUNNING, id="busy")
    async with house.services():
        await house.delete(P)
        await until(lambda: asked_to_stop(house))
        assert await house.trainer.runs.find(f"{P}/runs/1") is None, "one that has ended waits for nobody"
        for table, name in ((house.trainer.runs, f"{P}/runs/busy"), (house.scans, f"{P}/scans/busy")):
            await table.mutate(name, lambda job: setattr(job.status, "state", JOB_STATE_CANCELLED))  # type: ignore[attr-defined]
        await until(lambda: gone(house, P))


async def asked_to_stop(house: House) -> bool:
    jobs = [await house.trainer.runs.find(f"{P}/runs/busy"), await house.scans.find(f"{P}/scans/busy")]
    return all(job is not None and job.status.cancel_requested for job in jobs)


async def test_a_store_that_is_away_is_waited_for(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(key: str) -> None:
        raise StoreUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(house.store, "delete", away)
        async with house.services():
            await house.delete(P)
            await asyncio.sleep(0.05)
            assert await house.trainer.runs.find(f"{P}/runs/1") is not None, "what it names is there still"
            patch.undo()
            await until(lambda: gone(house, P))


async def test_a_deletion_that_was_cut_short_is_made_up_for_by_the_next_of_its_name(house: House) -> None:
    deleted = deleted_projects(house.runtime.state(BUCKET))
    await house.ingest.sources.create(Source(name=f"{P}/sources/s"))
    await house.ingest.projects.delete(P)  # and then ingest was killed
    async with house.services():
        await asyncio.sleep(0.05)
        assert await house.trainer.runs.find(f"{P}/runs/1") is not None, "what is missing may be lost"
        await house.create(P, time.time())
        assert await house.ingest.sources.find(f"{P}/sources/s") is None
        await until(lambda: lacks(house, f"{P}/datasets/1", f"{P}/runs/1", f"{P}/scans/1"))
    assert (await deleted.get(P)).HasField("successor_create_time") and await deleted.find(OTHER) is None
