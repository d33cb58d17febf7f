"""API keys: made, rotated, revoked. A secret is in one answer only, and in no address."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from starlette.responses import Response
from starlette.routing import Route

from codegraft.access.v1 import access_pb2 as pb
from services.core.errors import InvalidArgument
from services.gateway.console.session import PATH
from services.gateway.console.visit import House, Visit

ROLES = {
    "reader": pb.ROLE_READER,
    "completer": pb.ROLE_COMPLETER,
    "contributor": pb.ROLE_CONTRIBUTOR,
    "operator": pb.ROLE_OPERATOR,
}
_LONGEST_OVERLAP = 90 * 24
"""Hours."""


def routes(house: House) -> list[Route]:
    """All of them."""
    return [
        house.route("/system/keys", create, post=True),
        house.route("/system/keys/{key}/rotate", rotate, post=True),
        house.route("/system/keys/{key}/revoke", revoke, post=True),
    ]


async def create(visit: Visit) -> Response:
    """POST /console/system/keys: the page with its secret. Sent again it gives a new secret of the same key."""
    form = visit.form
    role, days = ROLES.get(form.text("role")), form.number("days")
    if role is None:
        raise InvalidArgument("no such role", field="role", hint=f"Take one of {', '.join(ROLES)}.")
    if days is not None and not 0 < days <= 36500:
        raise InvalidArgument("no such time", field="days", hint="Give days, or leave it empty for no end.")
    key, secret = await visit.client.keys.create(
        role,
        projects=form.all("projects"),
        all_projects=form.has("all_projects"),
        key_id=form.text("key_id"),
        title=form.text("title"),
        expires=datetime.now(UTC) + timedelta(days=days) if days else None,
        request_id=form.text("request_id"),
    )
    return visit.page("secret.html", key=key, secret=secret)


async def rotate(visit: Visit) -> Response:
    """POST /console/system/keys/ci/rotate: the page with the new secret."""
    hours = visit.form.number("overlap_hours")
    if hours is not None and not 0 <= hours <= _LONGEST_OVERLAP:
        raise InvalidArgument("no such time", field="overlap_hours", hint=f"Give 0 to {_LONGEST_OVERLAP} hours.")
    overlap = None if hours is None else timedelta(hours=hours)
    key, secret = await visit.client.keys.rotate(visit.request.path_params["key"], overlap=overlap)
    return visit.page("secret.html", key=key, secret=secret)


async def revoke(visit: Visit) -> Response:
    """POST /console/system/keys/ci/revoke"""
    await visit.client.keys.revoke(visit.request.path_params["key"])
    return visit.done(f"{PATH}/system#keys")
