"""What opens private repositories: tokens, and SSH keys whose public half one copies from here."""

from __future__ import annotations

from starlette.responses import Response
from starlette.routing import Route

from services.core import names
from services.core.errors import InvalidArgument
from services.gateway.console.visit import House, Visit


def routes(house: House) -> list[Route]:
    """All of them."""
    return [
        house.route("/p/{project}/credentials", create, post=True),
        house.route("/p/{project}/credentials/{credential}/delete", delete, post=True),
    ]


async def create(visit: Visit) -> Response:
    """POST /console/p/acme/credentials"""
    form, credentials = visit.form, visit.client.credentials
    credential_id, title = form.text("credential_id"), form.text("title")
    match form.text("kind"):
        case "ssh":
            await credentials.generate_ssh_key(
                visit.project,
                credential_id=credential_id,
                title=title,
                known_hosts=form.lines("known_hosts"),
                pin_on_first_use=form.has("pin_on_first_use"),
            )
        case "token":
            await credentials.create_token(
                visit.project,
                form.text("token"),
                username=form.text("username"),
                credential_id=credential_id,
                title=title,
            )
        case other:
            raise InvalidArgument(f"{other[:40]!r} is no kind of credential", field="kind", hint="Take ssh or token.")
    return visit.done(visit.way("/sources") + "#credentials")


async def delete(visit: Visit) -> Response:
    """POST /console/p/acme/credentials/deploy/delete"""
    ids = {"project": visit.project, "credential": visit.request.path_params["credential"]}
    await visit.client.credentials.delete(names.build(names.CREDENTIAL, **ids))
    return visit.done(visit.way("/sources") + "#credentials")
