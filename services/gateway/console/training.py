"""Training: the runs of a project, the plan of a new one, and two beside each other."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from starlette.responses import Response
from starlette.routing import Route

from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters, Plan
from codegraft.trainer.v1.run_pb2 import Run
from services.core import names
from services.core.errors import CodegraftError
from services.gateway.console import hyperparameters, jobs, live
from services.gateway.console.forms import Form
from services.gateway.console.visit import House, Visit, first

SHOWN = 200
"""Runs in the list, newest first."""


def routes(house: House) -> list[Route]:
    """All of them."""
    return [
        house.route("/p/{project}/training", show),
        house.route("/p/{project}/training", start, post=True),
        house.route("/p/{project}/training/live", follow),
        house.route("/p/{project}/training/new", new),
        house.route("/p/{project}/training/plan", plan, post=True),
        house.route("/p/{project}/training/compare", compare),
    ]


async def show(visit: Visit) -> Response:
    """GET /console/p/acme/training"""
    return visit.page("training.html", runs=await _newest(visit))


async def _newest(visit: Visit) -> list[Run]:
    return await first(visit.client.runs.list(visit.project), SHOWN)


async def follow(visit: Visit) -> Response:
    """GET /console/p/acme/training/live: the list, whenever a run of anybody's is new, changes or is gone."""
    runs = {run.name: run for run in await _newest(visit)}

    async def events() -> AsyncGenerator[bytes, None]:
        async for batch in live.Merged([visit.client.runs.watch_all(visit.project)]).batches():
            if not batch:
                yield live.STILL_HERE
                continue
            for change in batch:
                runs.pop(change.removed or change.run.name, None)
                if not change.removed:
                    runs[change.run.name] = change.run
            newest = jobs.newest_first(runs.values())[:SHOWN]
            yield live.message("part", visit.part("parts/runs.html", runs=newest))

    return live.answer(visit.request, events())


async def new(visit: Visit) -> Response:
    """GET /console/p/acme/training/new: the form, and what AUTO comes to everywhere."""
    return await _form(visit, visit.query)


async def plan(visit: Visit) -> Response:
    """POST /console/p/acme/training/plan: the same form with what it comes to, and why; trains nothing."""
    return await _form(visit, visit.form)


async def _form(visit: Visit, form: Form) -> Response:
    planned, problem = Plan(), None
    try:
        planned = await visit.client.runs.plan(
            visit.project,
            hyperparameters.of_form(form),
            dataset=_dataset(visit, form),
            base_model=form.text("base_model"),
        )
    except CodegraftError as error:  # the form is there to mend it
        problem = error
    return visit.page(
        "run_new.html",
        form=form,
        plan=planned,
        problem=problem,
        planned={each.name: each for each in planned.settings},
        groups=hyperparameters.GROUPS,
        datasets=await first(visit.client.datasets.list(visit.project), SHOWN),
        models=await first(visit.client.models.list(), SHOWN),
    )


def _dataset(visit: Visit, form: Form) -> str:
    chosen = form.text("dataset")
    return names.build(names.DATASET, project=visit.project, dataset=chosen) if chosen else ""


async def start(visit: Visit) -> Response:
    """POST /console/p/acme/training"""
    form = visit.form
    run, _, step = form.text("initial").partition("/")
    initial = names.build(names.CHECKPOINT, project=visit.project, run=run, step=step or "best") if run else ""
    started = await visit.client.runs.create(
        visit.project,
        hyperparameters.of_form(form),
        dataset=_dataset(visit, form),
        base_model=form.text("base_model"),
        title=form.text("title"),
        initial_checkpoint=initial,
    )
    return visit.done(visit.way(f"/training/{started.name.rpartition('/')[2]}"))


async def compare(visit: Visit) -> Response:
    """GET /console/p/acme/training/compare?a=&b="""
    chosen = [
        await visit.client.runs.get(names.build(names.RUN, project=visit.project, run=visit.query.text(side)))
        for side in ("a", "b")
    ]
    return visit.page("compare.html", runs=chosen, settings=_settings(*chosen))


def _settings(a: Run, b: Run) -> list[tuple[str, str, str]]:
    """(setting, a's, b's): as resolved, or as asked for while they are not."""
    found = [_values(run.plan.hyperparameters if run.HasField("plan") else run.requested) for run in (a, b)]
    return [
        (each.name, found[0].get(each.name, "AUTO"), found[1].get(each.name, "AUTO"))
        for each in hyperparameters.SETTINGS
    ]


def _values(message: Hyperparameters) -> dict[str, str]:
    found = {field.name: value for field, value in message.ListFields()}
    return {
        name: f"{value:g}" if isinstance(value, float) else " ".join(value) if name == "target_modules" else str(value)
        for name, value in found.items()
    }
