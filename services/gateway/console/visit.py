"""One request of a person, and the way from it to a page: session, CSRF, errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from services.client import AsyncCodegraft
from services.core import log
from services.core.errors import (
    CodegraftError,
    DeadlineExceeded,
    InternalError,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from services.core.rpc import context
from services.gateway.api import desk
from services.gateway.config import GatewaySettings
from services.gateway.console import forms
from services.gateway.console.forms import Form
from services.gateway.console.pages import Pages
from services.gateway.console.session import LOGIN_PATH, PATH, Session, Vault, end
from services.gateway.edge.attending import ClientGone
from services.gateway.edge.problems import Refused, status_of

T = TypeVar("T")
_logger = log.get("gateway")


@dataclass(frozen=True, slots=True)
class House:
    """What all pages share."""

    client: AsyncCodegraft
    """Without a key: each visit's calls carry its own, see :meth:`House.route`."""
    settings: GatewaySettings
    pages: Pages
    vault: Vault

    def route(self, path: str, endpoint: Endpoint, *, post: bool = False, method: str = "") -> Route:
        """A route of the console, for people who are signed in.

        Args:
            path: behind :data:`PATH`.
            post: whether it takes a form.
            method: another one than GET and POST; it carries the CSRF token in a header.
        """
        method = method or ("POST" if post else "GET")

        async def serve(request: Request) -> Response:
            session = self.vault.read(request)
            if session is None or not session.key:
                return self.signed_out(request)
            context.authorization.set(f"Bearer {session.key}")
            visit = Visit(self, request, session)
            try:
                if method != "GET":
                    visit = await visit.checked()
                return await endpoint(visit)
            except (CodegraftError, Refused) as error:
                return self.failed(visit, error)
            except ClientGone:
                raise
            except Exception as error:
                if not wants_page(request):
                    raise
                _logger.error("unexpected error", path=request.url.path, exc_info=error)
                told = f"internal error; look for request id {context.request_id.get()} in the logs"
                return self.failed(visit, InternalError(told))

        return Route(PATH + path, serve, methods=[method])

    def signed_out(self, request: Request) -> Response:
        """The way to sign in, for people; an error for scripts.

        Raises:
            Refused: it is no page that was asked for.
        """
        if request.method == "GET" and wants_page(request):
            way = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            return RedirectResponse(f"{LOGIN_PATH}?next={quote(way, safe='')}", 303)
        raise Refused(401, "UNAUTHENTICATED", "Nobody is signed in, or the session is over. Sign in again.")

    def failed(self, visit: Visit, error: CodegraftError | Refused) -> Response:
        """The page that tells of an error; scripts get it as editors do."""
        if not wants_page(visit.request):
            raise error
        if isinstance(error, Unauthenticated):  # the key ended; Unauthenticated is the root of those errors
            response = self.signed_out(visit.request) if visit.request.method == "GET" else _to_login()
            end(response)
            return response
        return visit.page("error.html", status_of(error), error=error, code=status_of(error))


def _to_login() -> Response:
    return RedirectResponse(LOGIN_PATH, 303)


@dataclass(frozen=True, slots=True)
class Visit:
    """One request of a person who is signed in."""

    house: House
    request: Request
    session: Session
    form: Form = field(default_factory=Form)
    """What was sent; empty for GET."""

    @property
    def client(self) -> AsyncCodegraft:
        """The services, with this person's key."""
        return self.house.client

    @property
    def project(self) -> str:
        """Id of the project in the address; empty on pages of none."""
        return str(self.request.path_params.get("project", ""))

    @property
    def query(self) -> Form:
        """What stands behind the address's question mark."""
        return forms.of_query(self.request)

    def way(self, path: str = "") -> str:
        """An address within the project."""
        return f"{PATH}/p/{quote(self.project, safe='')}{path}"

    def page(self, template: str, status: int = 200, /, **values: object) -> Response:
        """A page with its surroundings."""
        return self.house.pages.page(template, status, **self._surroundings(), **values)

    def part(self, template: str, **values: object) -> str:
        """A piece of a page."""
        return self.house.pages.part(template, **self._surroundings(), **values)

    def _surroundings(self) -> dict[str, object]:
        path = self.request.url.path
        place = path.removeprefix(self.way()).strip("/").partition("/")[0] if self.project else ""
        return {
            "csrf": self.session.csrf,
            "home": PATH,
            "project": self.project,
            "base": self.way() if self.project else "",
            "place": place or path.removeprefix(PATH).strip("/").partition("/")[0] or "projects",
        }

    def done(self, way: str) -> Response:
        """Where to go after a change: a redirect, or its address for static/forms.js."""
        if wants_page(self.request):
            return RedirectResponse(way, 303)
        return desk.answer({"location": way})

    async def checked(self) -> Visit:
        """With its form, once that is known to be of this session's pages.

        Raises:
            Refused: it is not, or cannot be read.
        """
        token, form = self.request.headers.get(forms.CSRF_HEADER, ""), Form()
        if self.request.headers.get("content-type", "").startswith(forms.TYPE):
            form = await forms.read(self.request, self.house.settings)
        if not self.session.owns(form.text(forms.CSRF_FIELD) or token):
            raise forged()
        return Visit(self.house, self.request, self.session, form)


Endpoint = Callable[[Visit], Awaitable[Response]]


def forged() -> Refused:
    """What a form without its session's token gets."""
    return Refused(403, "FORGED_FORM", "The form is not of this session. Load the page again and repeat it.")


def wants_page(request: Request) -> bool:
    """Whether a browser wants to show what comes, rather than a script to read it."""
    return "text/html" in request.headers.get("accept", "")


async def first(items: AsyncIterator[T], most: int) -> list[T]:
    """The first of a list that may be long."""
    found: list[T] = []
    async for item in items:
        found.append(item)
        if len(found) == most:
            break
    return found


async def if_allowed(call: Awaitable[T]) -> T | None:
    """What a call gives; None where the key may not make it: the rest of the page is there all the same."""
    try:
        return await call
    except PermissionDenied:
        return None


async def if_there(call: Awaitable[T]) -> T | None:
    """The same, also where a service is away: for pages that are looked at when something is."""
    try:
        return await call
    except (Unavailable, DeadlineExceeded, PermissionDenied):
        return None
