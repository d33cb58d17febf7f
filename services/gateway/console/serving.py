"""Serving: which adapter answers and where it came from, the choice, what people made of it, and what was before."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from datetime import timedelta

from starlette.responses import Response
from starlette.routing import Route

from codegraft.inference.v1 import serving_pb2 as pb
from services.core import names
from services.core.errors import InvalidArgument
from services.gateway.console import auditing, lineage, live
from services.gateway.console.visit import House, Visit, first, if_allowed, if_there
from services.gateway.console.words import version

MODES = {
    "off": pb.SERVING_MODE_OFF,
    "latest-best": pb.SERVING_MODE_LATEST_BEST,
    "pinned": pb.SERVING_MODE_PINNED,
}
_BASE = "base"
_HISTORY = timedelta(days=30)
_CHANGES = frozenset({"SetServing", "ApproveServing"})
_SHOWN = 50


def routes(house: House) -> list[Route]:
    """All of them."""
    return [
        house.route("/p/{project}/serving", show),
        house.route("/p/{project}/serving", choose, post=True),
        house.route("/p/{project}/serving/approve", approve, post=True),
        house.route("/p/{project}/serving/live", follow),
    ]


async def show(visit: Visit) -> Response:
    """GET /console/p/acme/serving"""
    client, days = visit.client, min(max(visit.query.whole("days") or 7, 1), 90)
    now = await client.serving.get(visit.project)
    history = await if_allowed(auditing.newest(client.audit, visit.project, _HISTORY, 1000))
    runs = await if_there(first(client.runs.list(visit.project), _SHOWN)) or []
    return visit.page(
        "serving.html",
        serving=now.serving,
        status=now.status,
        mode=next((word for word, mode in MODES.items() if mode == now.serving.mode), "off"),
        lineage=await lineage.of(client, now.status.active_checkpoint),
        acceptance=await client.feedback.acceptance(visit.project, timedelta(days=days)),
        days=days,
        history=None if history is None else [each for each in history if each.method in _CHANGES][:_SHOWN],
        checkpoints=[version(run.best_checkpoint) for run in runs if run.best_checkpoint],
    )


async def follow(visit: Visit) -> Response:
    """GET /console/p/acme/serving/live: policy, replica and swaps after every change, and the new lineage."""

    async def events() -> AsyncGenerator[bytes, None]:
        active: str | None = None
        client = visit.client
        async for batch in live.Merged([client.serving.watch(visit.project)]).batches():
            if not batch:
                yield live.STILL_HERE
                continue
            newest = batch[-1]
            for part in ("serving_state", "swaps"):
                html = visit.part(f"parts/{part}.html", serving=newest.serving, status=newest.status)
                yield live.message("part", html)
            # The first time, too: there may have been a swap since the page was made, or while its connection was lost.
            if active != newest.status.active_checkpoint:
                found = await lineage.of(client, newest.status.active_checkpoint)
                yield live.message("part", visit.part("parts/lineage.html", lineage=found))
                active = None if found.away else newest.status.active_checkpoint

    return live.answer(visit.request, events())


async def choose(visit: Visit) -> Response:
    """POST /console/p/acme/serving"""
    form, serving = visit.form, visit.client.serving
    mode = MODES.get(form.text("mode"))
    if mode is None:
        raise InvalidArgument("no such policy", field="mode", hint="Take off, latest-best or pinned.")
    is_pinned = mode == pb.SERVING_MODE_PINNED
    checkpoint = await checkpoint_of(visit, form.text("checkpoint"), "checkpoint") if is_pinned else ""
    other, percent = form.text("split"), form.whole("percent")
    if bool(other) != bool(percent):
        missing = "percent" if other else "split"
        raise InvalidArgument("a split needs a version and its part", field=missing, hint="Give both, or none.")
    split = None
    if other and percent:
        if not 1 <= percent <= 99:
            raise InvalidArgument("a part is 1 to 99 percent", field="percent", hint="Give 1 to 99.")
        second = "" if other == _BASE else await checkpoint_of(visit, other, "split")
        split = pb.Split(checkpoint=second, percent=percent)
    await serving.set(visit.project, mode, checkpoint=checkpoint, split=split, etag=form.text("etag"))
    return visit.done(visit.way("/serving"))


async def checkpoint_of(visit: Visit, written: str, field: str) -> str:
    """The full name of RUN/STEP; of RUN its best one's."""
    run, _, step = written.partition("/")
    if not run:
        raise InvalidArgument("no checkpoint is named", field=field, hint="Write RUN/STEP, or RUN for its best one.")
    name = names.build(names.CHECKPOINT, project=visit.project, run=run, step=step or "best")
    return (await visit.client.runs.checkpoint(name)).name


async def approve(visit: Visit) -> Response:
    """POST /console/p/acme/serving/approve"""
    await visit.client.serving.approve(visit.project, visit.form.text("checkpoint"), etag=visit.form.text("etag"))
    return visit.done(visit.way("/serving"))
