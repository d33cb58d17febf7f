"""What a scan decided about its files: lists with a filter, and one file's verdict explained."""

from __future__ import annotations

import re
from urllib.parse import urlencode

from starlette.responses import Response
from starlette.routing import Route

from codegraft.scanner.v1.verdict_pb2 import VerdictFilter, VerdictReason
from services.core import names
from services.core.errors import InvalidArgument, VerdictNotFound
from services.gateway.console.dataset import scan_name
from services.gateway.console.forms import Form
from services.gateway.console.visit import House, Visit

_PAGE = 100
_PREFIX = "VERDICT_REASON_"
REASONS = tuple(name.removeprefix(_PREFIX) for name in VerdictReason.keys()[1:])
"""As people write them."""
_WHICH = {"": None, "accepted": True, "rejected": False}


def routes(house: House) -> list[Route]:
    """Both of them."""
    return [
        house.route("/p/{project}/dataset/files", show),
        house.route("/p/{project}/dataset/file", explain),
    ]


def filter_of(form: Form) -> VerdictFilter:
    """What the page's fields ask for.

    Raises:
        InvalidArgument: a field holds no such value; names it.
    """
    if form.text("which") not in _WHICH:
        raise InvalidArgument("no such choice", field="which", hint="Take accepted, rejected, or neither.")
    reasons = form.all("reason")
    if unknown := [word for word in reasons if word not in REASONS]:
        raise InvalidArgument(f"{unknown[0][:40]!r} is no reason", field="reason", hint="Choose one of the list.")
    return VerdictFilter(
        accepted=_WHICH[form.text("which")],
        reasons=[_PREFIX + word for word in reasons],
        languages=form.all("language"),
        path=form.text("path"),
        min_loss=form.number("min_loss"),
        max_loss=form.number("max_loss"),
    )


async def show(visit: Visit) -> Response:
    """GET /console/p/acme/dataset/files?scan=&which=&reason=&language=&path=&min_loss=&max_loss=&page="""
    query = visit.query
    name = scan_name(visit, query.text("scan"))
    found = await visit.client.scans.verdict_page(
        name, filter_of(query), page_size=_PAGE, page_token=query.text("page")
    )
    kept = [(key, value) for key, value in query.pairs if key != "page" and value]
    return visit.page(
        "files.html",
        scan=query.text("scan"),
        form=query,
        found=found,
        reasons=REASONS,
        first="?" + urlencode(kept),
        following="?" + urlencode([*kept, ("page", found.next_page_token)]) if found.next_page_token else "",
    )


async def explain(visit: Visit) -> Response:
    """GET /console/p/acme/dataset/file?scan=&source=&path=: every reason, what was measured, what was asked of it."""
    query = visit.query
    scan = await visit.client.scans.get(scan_name(visit, query.text("scan")))
    path = query.raw("path").strip("/")
    source = names.build(names.SOURCE, project=visit.project, source=query.text("source"))
    wanted = VerdictFilter(path="/" + re.sub(r"([\\*?\[ ])", r"\\\1", path))  # as a mask that means just this path
    async for verdict in visit.client.scans.verdicts(scan.name, wanted):
        if (verdict.path, verdict.source) == (path, source):
            usual = scan.report.losses.get(verdict.language)
            given = zip(verdict.reasons, [*verdict.details, *[""] * len(verdict.reasons)], strict=False)
            return visit.page("file.html", scan=scan, verdict=verdict, usual=usual, given=list(given))
    raise VerdictNotFound(f"the scan has no file {path[:200]!r} of that source", field="path", hint="Look in the list.")
