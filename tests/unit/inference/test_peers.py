"""What ingest says of projects, and what is made of it when it says nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import pytest

from codegraft.ingest.v1 import project_pb2, project_pb2_grpc
from services.core.errors import DeadlineExceeded, ProjectNotFound, Unavailable
from services.core.rpc.client import channel
from services.core.rpc.interceptors import CallInterceptor
from services.inference import peers
from services.inference.peers import IngestProjects


class Ingest(project_pb2_grpc.ProjectServiceServicer):
    """Has some projects, and may have lost its own servers: then it is slow to say so."""

    def __init__(self) -> None:
        self.projects = {"projects/one": project_pb2.Project(name="projects/one")}
        self.asked = 0
        self.lost = False

    async def GetProject(
        self, request: project_pb2.GetProjectRequest, context: object
    ) -> project_pb2.GetProjectResponse:
        self.asked += 1
        if self.lost:
            await asyncio.sleep(30)
        if request.name not in self.projects:
            raise ProjectNotFound("no such project")
        return project_pb2.GetProjectResponse(project=self.projects[request.name])


@pytest.fixture
async def asking(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Ingest, IngestProjects]]:
    monkeypatch.setattr(peers, "_TIMEOUT", 0.3)
    monkeypatch.setattr(peers, "_REMEMBERED", 0.1)
    monkeypatch.setattr(peers, "_AGAIN", 0.1)
    ingest, server = Ingest(), grpc.aio.server(interceptors=[CallInterceptor()])
    project_pb2_grpc.add_ProjectServiceServicer_to_server(ingest, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield ingest, IngestProjects(channel(f"127.0.0.1:{port}"))
    await server.stop(0)


async def test_completions_do_not_wait_for_an_ingest_that_hangs(asking: tuple[Ingest, IngestProjects]) -> None:
    ingest, projects = asking
    assert await projects.exists("projects/one")
    end = time.monotonic() + 10
    while await projects.exists("projects/none"):  # so it seems while ingest is not heard in time
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    ingest.lost = True
    began, before, slow = time.monotonic(), ingest.asked, 0
    while (asked := ingest.asked - before) < 4 and time.monotonic() - began < 20:
        slow += await seconds(projects, "projects/one") > 0.25
        await asyncio.sleep(0.01)
    # Each that waited would have waited for all of one question; now and then the machine stands still as long.
    assert slow < asked / 2 and 4 <= asked <= 2 + 10 * (time.monotonic() - began), (slow, asked)
    await seconds(projects, "projects/two")  # nobody can say that it is not there
    assert min([await seconds(projects, "projects/two") for _ in range(3)]) < 0.25, "and nobody waits for that twice"


async def seconds(projects: IngestProjects, project: str) -> float:
    """What it takes to learn that a project is there."""
    began = time.monotonic()
    assert await projects.exists(project)
    return time.monotonic() - began


async def test_a_project_that_was_deleted_is_found_out(asking: tuple[Ingest, IngestProjects]) -> None:
    ingest, projects = asking
    assert await projects.exists("projects/one")
    ingest.projects.clear()
    end = time.monotonic() + 5
    while await projects.exists("projects/one"):
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    ingest.projects["projects/one"] = project_pb2.Project(name="projects/one")
    assert await projects.exists("projects/one"), "one that is not there is not remembered"


async def test_texts_are_kept_since_that_was_turned_on_and_an_ingest_that_is_away_does_not_say(
    asking: tuple[Ingest, IngestProjects],
) -> None:
    ingest, projects = asking
    record = ingest.projects["projects/one"]
    assert await projects.kept_since("projects/one") is None and await projects.kept_since("projects/no") is None
    record.keep_completions = True
    record.create_time.FromSeconds(1_700_000_000)
    assert await projects.kept_since("projects/one") == 1_700_000_000, "of before the time was noted"
    record.keep_completions_time.FromSeconds(1_700_000_060)
    assert await projects.kept_since("projects/one") == 1_700_000_060
    record.keep_completions = False
    assert await projects.kept_since("projects/one") is None, "off means off at once"
    record.keep_completions = ingest.lost = True
    with pytest.raises((Unavailable, DeadlineExceeded)):
        await projects.kept_since("projects/one")
