"""One run: its state, curves and log as they come, its checkpoints, and what can be done with it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable

import orjson
from starlette.responses import Response
from starlette.routing import Route

from codegraft.trainer.v1.run_pb2 import Run
from services.client.aio.trainer import Runs
from services.client.proof import proof_rows
from services.core import names
from services.core.errors import InvalidArgument
from services.gateway.console import live, story
from services.gateway.console.download import FORMATS, as_tar
from services.gateway.console.visit import House, Visit

_ACTIONS: dict[str, Callable[[Runs, str], Awaitable[Run]]] = {
    "pause": Runs.pause,
    "resume": Runs.resume,
    "cancel": Runs.cancel,
}


def routes(house: House) -> list[Route]:
    """All of them; behind those of training.py, whose addresses look alike."""
    path = "/p/{project}/training/{run}"
    return [
        house.route(path, show),
        house.route(f"{path}/live", follow),
        house.route(f"{path}/do/{{action}}", act, post=True),
        house.route(f"{path}/checkpoints/{{step}}/keep", keep, post=True),
        house.route(f"{path}/checkpoints/{{step}}/adapter.tar", download),
    ]


def _name(visit: Visit) -> str:
    return names.build(names.RUN, project=visit.project, run=visit.request.path_params["run"])


def _checkpoint(visit: Visit) -> str:
    params = visit.request.path_params
    return names.build(names.CHECKPOINT, project=visit.project, run=params["run"], step=params["step"])


async def show(visit: Visit) -> Response:
    """GET /console/p/acme/training/r-0abc"""
    run = await visit.client.runs.get(_name(visit))
    checkpoints = [each async for each in visit.client.runs.checkpoints(run.name)]
    return visit.page("run.html", run=run, checkpoints=checkpoints, proof=proof_rows(run.proof))


async def follow(visit: Visit) -> Response:
    """GET /console/p/acme/training/r-0abc/live: the story from its start, or from where the browser has it."""
    name, after = _name(visit), live.last_position(visit.request)

    async def events() -> AsyncGenerator[bytes, None]:
        merged = live.Merged([visit.client.runs.watch(name, after)])
        async for batch in merged.batches():
            if not batch:
                yield live.STILL_HERE
                continue
            happened = [each.event for each in batch if each.HasField("event")]
            if happened:
                told = orjson.dumps(story.points(happened)).decode()
                yield live.message("points", told, happened[-1].sequence)
            yield live.message("part", visit.part("parts/run_state.html", run=batch[-1].run))
            if any(each.HasField("checkpoint") or each.HasField("best") for each in happened):
                checkpoints = [each async for each in visit.client.runs.checkpoints(name)]
                yield live.message("part", visit.part("parts/checkpoints.html", checkpoints=checkpoints))

    return live.answer(visit.request, events())


async def act(visit: Visit) -> Response:
    """POST /console/p/acme/training/r-0abc/do/pause"""
    action = _ACTIONS.get(visit.request.path_params["action"])
    if action is None:
        raise InvalidArgument("no such action", field="action", hint=f"One of {', '.join(_ACTIONS)}.")
    run = await action(visit.client.runs, _name(visit))
    return visit.done(visit.way(f"/training/{run.name.rpartition('/')[2]}"))


async def keep(visit: Visit) -> Response:
    """POST /console/p/acme/training/r-0abc/checkpoints/120/keep"""
    await visit.client.runs.keep(_checkpoint(visit), visit.form.has("kept"))
    return visit.done(visit.way(f"/training/{visit.request.path_params['run']}"))


async def download(visit: Visit) -> Response:
    """GET /console/p/acme/training/r-0abc/checkpoints/120/adapter.tar?format=: as PEFT reads it, merged, or as GGUF."""
    wanted = FORMATS.get(visit.query.text("format", "peft"))
    if wanted is None:
        raise InvalidArgument("no such format", field="format", hint=f"One of {', '.join(FORMATS)}.")
    return await as_tar(visit.client.adapters, _checkpoint(visit), wanted)
