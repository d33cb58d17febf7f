"""Deadlines, retries, errors, pages: what every call of both clients does."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest

from codegraft.inference.v1 import serving_pb2
from codegraft.ingest.v1 import project_pb2
from services.client import Addresses, AsyncCodegraft, retry
from services.core import errors
from services.core.rpc import context

PROJECT = project_pb2.GetProjectResponse(project=project_pb2.Project(name="projects/p"))


async def hang(request: Any) -> Any:
    await asyncio.sleep(30)


# --- retries ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("error", [errors.Unavailable, errors.StateUnavailable, errors.ModelLoading])
async def test_a_read_is_repeated_over_an_outage(codegraft: Any, fake: Any, error: type[errors.CodegraftError]) -> None:
    fake.scripts["GetProject"] = [error("away"), error("away"), PROJECT]
    found = await codegraft.call(lambda c: c.projects.get("p"))
    assert found.name == "projects/p"
    assert fake.count("GetProject") == 3


@pytest.mark.usefixtures("hasty")
async def test_an_outage_that_lasts_is_told_after_a_bounded_number_of_tries(codegraft: Any, fake: Any) -> None:
    fake.scripts["GetProject"] = [errors.StateUnavailable("NATS is away", hint="start it")]
    with pytest.raises(errors.StateUnavailable, match="NATS is away") as caught:
        await codegraft.call(lambda c: c.projects.get("p"))
    assert caught.value.hint == "start it"
    assert fake.count("GetProject") == retry.ATTEMPTS


@pytest.mark.usefixtures("hasty")
async def test_at_the_deadline_the_outage_behind_it_is_told(codegraft: Any, fake: Any) -> None:
    fake.scripts["GetProject"] = [errors.StateUnavailable("NATS is away"), hang]
    with pytest.raises(errors.StateUnavailable, match="NATS is away"):
        await codegraft.call(lambda c: c.with_timeout(0.5).projects.get("p"))
    assert fake.count("GetProject") == 2


@pytest.mark.usefixtures("hasty")
async def test_a_create_keeps_its_request_id_over_all_tries_and_two_creates_differ(codegraft: Any, fake: Any) -> None:
    fake.scripts["CreateRun"] = [errors.Unavailable("away"), errors.Unavailable("away"), lambda _: _run()]
    await codegraft.call(lambda c: c.runs.create("p"))
    await codegraft.call(lambda c: c.runs.create("p"))
    await codegraft.call(lambda c: c.runs.create("p", request_id="mine"))
    ids = [request.request_id for request in fake.requests["CreateRun"]]
    assert len(ids) == 5
    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert len(ids[0]) == 32
    assert ids[4] == "mine"


def _run() -> Any:
    from codegraft.trainer.v1 import run_pb2

    return run_pb2.CreateRunResponse()


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("method", "use"),
    [
        ("UpdateProject", lambda c: c.projects.update(project_pb2.Project(name="projects/p", etag="3"))),
        ("DeleteProject", lambda c: c.projects.delete("p")),
        ("DeleteSource", lambda c: c.sources.remove("projects/p/sources/s")),
        ("UnloadAdapter", lambda c: c.serving.unload("projects/p/runs/r/checkpoints/1")),
        ("SetServing", lambda c: c.serving.set("p", serving_pb2.SERVING_MODE_OFF, etag="3")),
    ],
)
async def test_what_is_not_the_same_twice_is_tried_once(codegraft: Any, fake: Any, method: str, use: Any) -> None:
    fake.scripts[method] = [errors.Unavailable("away")]
    with pytest.raises(errors.Unavailable):
        await codegraft.call(use)
    assert fake.count(method) == 1


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("error", [errors.ProjectNotFound, errors.EtagMismatch, errors.InternalError, errors.QueueFull])
async def test_an_error_that_would_come_again_is_not_repeated(
    codegraft: Any, fake: Any, error: type[errors.CodegraftError]
) -> None:
    fake.scripts["GetProject"] = [error("no"), PROJECT]
    with pytest.raises(error):
        await codegraft.call(lambda c: c.projects.get("p"))
    assert fake.count("GetProject") == 1


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("error", [errors.QueueFull, errors.StateUnavailable])
async def test_the_services_retry_delay_is_honoured(
    codegraft: Any, fake: Any, error: type[errors.CodegraftError]
) -> None:
    fake.scripts["GetProject"] = [error("busy", retry_after=0.3), PROJECT]
    began = time.monotonic()
    await codegraft.call(lambda c: c.projects.get("p"))
    assert 0.3 <= time.monotonic() - began < 10
    assert fake.count("GetProject") == 2


async def test_a_service_that_asks_for_much_patience_is_not_waited_for(codegraft: Any, fake: Any) -> None:
    fake.scripts["GetProject"] = [errors.ModelLoading("loading", retry_after=60)]
    with pytest.raises(errors.ModelLoading) as caught:
        await codegraft.call(lambda c: c.projects.get("p"))
    assert caught.value.retry_after == 60
    assert fake.count("GetProject") == 1


def test_callers_that_were_told_the_same_time_do_not_come_together() -> None:
    delays = {retry.delay(errors.QueueFull("busy", retry_after=2), 0) for _ in range(20)}
    assert len(delays) == 20
    assert all(2 < delay < 2.5 for delay in delays)


async def test_a_server_that_restarts_is_waited_for(fake: Any) -> None:
    async def start(port: int = 0) -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((fake,))
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        return server, bound

    fake.scripts["GetProject"] = [PROJECT]
    server, port = await start()
    address = f"127.0.0.1:{port}"
    async with AsyncCodegraft(Addresses(address, address, address, address)) as client:
        await client.projects.get("p")
        await server.stop(None)
        asking = asyncio.create_task(client.projects.get("p"))
        await asyncio.sleep(0.5)
        assert not asking.done()
        server, _ = await start(port)
        assert (await asking).name == "projects/p"
    await server.stop(None)


# --- deadlines --------------------------------------------------------------------------------------------------


async def test_the_deadline_is_told_to_the_service_and_can_be_set(codegraft: Any, fake: Any) -> None:
    seen = []
    fake.scripts["GetProject"] = [lambda _: seen.append(fake.remaining["GetProject"][-1]) or PROJECT]
    await codegraft.call(lambda c: c.projects.get("p"))
    await codegraft.call(lambda c: c.with_timeout(90).projects.get("p"))
    await codegraft.call(lambda c: c.projects.get("p"))
    # What a busy machine takes on the way, and gRPC rounds up, is less than what tells them apart.
    assert [20 < seen[0] < 31, 80 < seen[1] < 91, 20 < seen[2] < 31] == [True] * 3, seen


async def test_a_deadline_that_passes_is_an_error_of_its_own(codegraft: Any, fake: Any) -> None:
    fake.scripts["GetProject"] = [hang]
    began = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded):
        await codegraft.call(lambda c: c.with_timeout(0.3).projects.get("p"))
    assert time.monotonic() - began < 10
    assert fake.count("GetProject") == 1
    await asyncio.wait_for(fake.cancelled.wait(), 5)


async def test_all_tries_share_one_deadline(codegraft: Any, fake: Any) -> None:
    fake.scripts["GetProject"] = [errors.StateUnavailable("away", retry_after=0.5)]
    began = time.monotonic()
    with pytest.raises(errors.StateUnavailable):
        await codegraft.call(lambda c: c.with_timeout(1.6).projects.get("p"))
    assert time.monotonic() - began < 10
    assert 2 <= fake.count("GetProject") < retry.ATTEMPTS


async def test_within_a_service_a_call_ends_with_the_call_it_is_made_for(fake: Any, address: str) -> None:
    fake.scripts["GetProject"] = [hang]

    async def serve() -> None:
        context.set_deadline(1.0)
        context.request_id.set("req-9")
        async with AsyncCodegraft(Addresses(address, address, address, address)) as client:
            with pytest.raises(errors.DeadlineExceeded):
                await client.projects.get("p")

    began = time.monotonic()
    await asyncio.create_task(serve())
    assert time.monotonic() - began < 10 and fake.remaining["GetProject"][0] < 1.0, "what is left to its caller"
    metadata = fake.metadata["GetProject"][0]
    assert metadata["x-request-id"] == "req-9"


# --- errors -----------------------------------------------------------------------------------------------------


async def test_an_error_says_all_that_the_service_said(codegraft: Any, fake: Any) -> None:
    error = errors.InvalidMask("bad mask", field="project.exclude[1]", hint="close the bracket", mask="[a")
    fake.scripts["UpdateProject"] = [error]
    with pytest.raises(errors.InvalidMask) as caught:
        await codegraft.call(lambda c: c.projects.update(project_pb2.Project(name="projects/p")))
    assert (caught.value.message, caught.value.field, caught.value.hint) == (error.message, error.field, error.hint)
    assert caught.value.metadata == {"mask": "[a"}
    assert caught.value.__cause__ is None


async def test_a_bad_project_id_is_told_without_a_call(codegraft: Any, fake: Any) -> None:
    with pytest.raises(errors.InvalidName):
        await codegraft.call(lambda c: c.projects.get("No Spaces"))
    assert not fake.requests


async def test_a_project_may_be_named_by_id_or_in_full(codegraft: Any, fake: Any) -> None:
    for project in ("p", "projects/p"):
        await codegraft.call(lambda c, project=project: c.projects.get(project))
    assert [request.name for request in fake.requests["GetProject"]] == ["projects/p", "projects/p"]


# --- pages ------------------------------------------------------------------------------------------------------


def page(request: Any) -> Any:
    number = int(request.page_token or 0)
    projects = [project_pb2.Project(name=f"projects/p{number}-{n}") for n in range(2)]
    return project_pb2.ListProjectsResponse(projects=projects, next_page_token=str(number + 1) if number < 2 else "")


async def test_a_list_goes_through_all_pages(codegraft: Any, fake: Any) -> None:
    fake.scripts["ListProjects"] = [page]
    found = await codegraft.take(lambda c: c.projects.list(page_size=2))
    assert [project.name for project in found] == [f"projects/p{a}-{b}" for a in range(3) for b in range(2)]
    assert [(r.page_size, r.page_token) for r in fake.requests["ListProjects"]] == [(2, ""), (2, "1"), (2, "2")]


async def test_a_list_asks_for_no_page_that_nobody_wants(codegraft: Any, fake: Any) -> None:
    fake.scripts["ListProjects"] = [page]
    assert len(await codegraft.take(lambda c: c.projects.list(), 2)) == 2
    assert fake.count("ListProjects") == 1


@pytest.mark.usefixtures("hasty")
async def test_a_page_is_repeated_over_an_outage_and_none_comes_twice(codegraft: Any, fake: Any) -> None:
    fake.scripts["ListProjects"] = [page, errors.Unavailable("away"), page]
    assert len({project.name for project in await codegraft.take(lambda c: c.projects.list())}) == 6


async def test_an_empty_page_in_the_middle_does_not_end_the_list(codegraft: Any, fake: Any) -> None:
    fake.scripts["ListProjects"] = [project_pb2.ListProjectsResponse(next_page_token="1"), page]
    assert len(await codegraft.take(lambda c: c.projects.list())) == 4
