"""The dataset: a scan and what it found, new ones, languages on and off."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from urllib.parse import urlencode

from starlette.responses import Response
from starlette.routing import Route

from codegraft.scanner.v1.scan_pb2 import Scan, ScanReport
from services.client.jobs import FINAL
from services.core import names
from services.core.errors import InvalidArgument
from services.core.rpc import context
from services.gateway.api import desk
from services.gateway.console import histogram, jobs, live, scan_settings
from services.gateway.console.forms import Form
from services.gateway.console.visit import House, Visit, first

_SHOWN = 50
"""Scans and snapshots to choose from, newest first."""
_STAGE_2 = frozenset({"HIGH_LOSS", "FILTER_EMPTY"})


def routes(house: House) -> list[Route]:
    """All of them."""
    return [
        house.route("/p/{project}/dataset", show),
        house.route("/p/{project}/dataset", start, post=True),
        house.route("/p/{project}/dataset/new", new),
        house.route("/p/{project}/dataset/cancel", cancel, post=True),
        house.route("/p/{project}/dataset/languages", languages, post=True),
        house.route("/p/{project}/dataset/live", follow),
        house.route("/p/{project}/dataset/preview", preview),
    ]


def scan_name(visit: Visit, scan: str) -> str:
    """The full name of a scan of the project in the address."""
    return names.build(names.SCAN, project=visit.project, scan=scan)


async def show(visit: Visit) -> Response:
    """GET /console/p/acme/dataset?scan=; the newest scan without one."""
    scans = await first(visit.client.scans.list(visit.project), _SHOWN)
    chosen = visit.query.text("scan")
    scan = await visit.client.scans.get(scan_name(visit, chosen)) if chosen else (scans[0] if scans else None)
    project = await visit.client.projects.get(visit.project)
    shown = scan.name.rpartition("/")[2] if scan else ""
    return visit.page("dataset.html", scans=scans, shown=shown, record=project, **_report(scan))


def _report(scan: Scan | None) -> dict[str, object]:
    """What the templates want to know of a scan."""
    if scan is None:
        return {"scan": None, "funnel": [], "histogram": None, "reasons": []}
    reasons = sorted(scan.report.reasons.items(), key=lambda each: (each[0] != "ACCEPTED", -each[1].files))
    return {"scan": scan, "funnel": funnel(scan.report), "histogram": histogram.of(scan), "reasons": reasons}


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the funnel."""

    title: str
    files: int


def funnel(report: ScanReport) -> list[Step]:
    """How many files are left after each stage."""
    by_rules = sum(
        count.files for reason, count in report.reasons.items() if reason not in _STAGE_2 and reason != "ACCEPTED"
    )
    return [
        Step("in the snapshot", report.file_count),
        Step("left by the rules", report.file_count - by_rules),
        Step("left by the loss: accepted", report.accepted_count),
        Step("to train on", report.train.files),
        Step("held out as test", report.test.files),
    ]


async def follow(visit: Visit) -> Response:
    """GET /console/p/acme/dataset/live?shown=&going=: the scans to choose from, whenever one of anybody's is new or
    changes, and the shown one as it goes, with its report once it has one.

    It ends when the page is to be loaded anew: once the shown scan, when it was going, has ended, or when there is a
    scan though none was shown.
    """
    shown, is_going = visit.query.text("shown"), visit.query.has("going")
    name = scan_name(visit, shown) if shown else ""
    scans = {scan.name: scan for scan in await first(visit.client.scans.list(visit.project), _SHOWN)}

    async def events() -> AsyncGenerator[bytes, None]:
        async for batch in live.Merged([visit.client.scans.watch_all(visit.project)]).batches():
            if not batch:
                yield live.STILL_HERE
                continue
            for change in batch:
                scans.pop(change.removed or change.scan.name, None)
                if not change.removed:
                    scans[change.scan.name] = change.scan
            if scans and not shown:
                return
            newest = jobs.newest_first(scans.values())[:_SHOWN]
            yield live.message("part", visit.part("parts/scan_choice.html", scans=newest, shown=shown))
            here = [change.scan for change in batch if change.scan.name == name]
            if is_going and here:
                yield live.message("part", visit.part("parts/scan_state.html", scan=here[-1]))
                if here[-1].report.file_count:
                    yield live.message("part", visit.part("parts/scan_report.html", **_report(here[-1])))
                if here[-1].status.state in FINAL:
                    return

    return live.answer(visit.request, events())


async def new(visit: Visit) -> Response:
    """GET /console/p/acme/dataset/new"""
    snapshots = await first(visit.client.snapshots.list(visit.project), _SHOWN)
    return visit.page("scan_new.html", snapshots=snapshots, groups=scan_settings.GROUPS, form=visit.query, planned={})


async def start(visit: Visit) -> Response:
    """POST /console/p/acme/dataset: a scan with the form's settings, or one more with another threshold."""
    form, client = visit.form, visit.client
    context.set_deadline(None)  # a snapshot of many sources takes its time: the client knows how long
    if form.text("again"):
        before = await client.scans.get(scan_name(visit, form.text("again")))
        snapshot, settings = before.snapshot, before.settings
        settings.max_loss = _threshold(form)
        settings.ClearField("loss_mad")
    else:
        settings = scan_settings.of_form(form)
        chosen = form.text("snapshot")
        snapshot = (
            names.build(names.SNAPSHOT, project=visit.project, snapshot=chosen)
            if chosen
            else (await client.snapshots.create(visit.project)).name
        )
    scan = await client.scans.create(visit.project, snapshot, settings)
    return visit.done(visit.way("/dataset?" + urlencode({"scan": scan.name.rpartition("/")[2]})))


def _threshold(form: Form) -> float:
    value = form.number("threshold")
    if value is None:
        raise InvalidArgument("no threshold is given", field="threshold", hint="Give a loss in nats per token.")
    return value


async def cancel(visit: Visit) -> Response:
    """POST /console/p/acme/dataset/cancel"""
    scan = await visit.client.scans.cancel(scan_name(visit, visit.form.text("scan")))
    return visit.done(visit.way("/dataset?" + urlencode({"scan": scan.name.rpartition("/")[2]})))


async def languages(visit: Visit) -> Response:
    """POST /console/p/acme/dataset/languages: which ones the next scans leave out.

    Boxes that are not checked are not sent: of the languages that were shown, those are off. Others stay as they were.
    """
    form, project = visit.form, await visit.client.projects.get(visit.project)
    shown, on = set(form.all("shown")), set(form.all("on"))
    project.etag = form.text("etag")
    off = (set(project.languages_off) - shown) | (shown - on)
    project.languages_off[:] = sorted(off)
    await visit.client.projects.update(project)
    return visit.done(visit.way("/dataset"))


async def preview(visit: Visit) -> Response:
    """GET /console/p/acme/dataset/preview?scan=&threshold=: what that would change."""
    name, threshold = scan_name(visit, visit.query.text("scan")), _threshold(visit.query)
    return desk.answer(await histogram.preview(visit.client.scans, name, threshold))
