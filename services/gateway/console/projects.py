"""The projects that one may see, a new one, and what each says of all its sources."""

from __future__ import annotations

from starlette.responses import Response
from starlette.routing import Route

from services.gateway.console import quota
from services.gateway.console.session import PATH
from services.gateway.console.visit import House, Visit


def routes(house: House) -> list[Route]:
    """All of them."""
    return [
        house.route("", show),
        house.route("/", show),
        house.route("/projects", create, post=True),
        house.route("/p/{project}", settings),
        house.route("/p/{project}/settings", save, post=True),
        house.route("/p/{project}/delete", delete, post=True),
    ]


async def show(visit: Visit) -> Response:
    """GET /console"""
    projects = [each async for each in visit.client.projects.list()]
    return visit.page("projects.html", projects=projects, caller=await visit.client.keys.whoami())


async def create(visit: Visit) -> Response:
    """POST /console/projects"""
    form = visit.form
    project = await visit.client.projects.create(form.text("project_id"), title=form.text("title"))
    return visit.done(f"{PATH}/p/{project.name.rpartition('/')[2]}/sources")


async def settings(visit: Visit) -> Response:
    """GET /console/p/acme: masks, languages and licences, and what it uses of its quota."""
    record = await visit.client.projects.get(visit.project)
    return visit.page("project.html", record=record, quota=await quota.rows(visit))


async def save(visit: Visit) -> Response:
    """POST /console/p/acme/settings"""
    form, record = visit.form, await visit.client.projects.get(visit.project)
    record.etag, record.title = form.text("etag"), form.text("title")
    record.exclude[:], record.include[:] = form.lines("exclude"), form.lines("include")
    record.exclude_licenses[:] = form.lines("exclude_licenses")
    record.keep_completions = form.has("keep_completions")
    await visit.client.projects.update(record)
    return visit.done(visit.way())


async def delete(visit: Visit) -> Response:
    """POST /console/p/acme/delete"""
    await visit.client.projects.delete(visit.project, force=visit.form.has("force"), etag=visit.form.text("etag"))
    return visit.done(PATH)
