"""Signing in and out."""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from services.core.errors import CodegraftError
from services.core.rpc import context
from services.gateway.console import forms
from services.gateway.console.session import LOGIN_COOKIE, LOGIN_PATH, LONGEST_KEY, PATH, Session, end, is_https
from services.gateway.console.visit import House, Visit, forged
from services.gateway.edge.problems import Refused, status_of

_KEY = re.compile(r"[\x21-\x7e]+")
_OWN = re.compile(rf"{PATH}(/[A-Za-z0-9._~%/?&=+,:@-]*)?")
"""Addresses of the console: what "next" may lead to, so that no link to us leads elsewhere."""


class Login:
    """The page; see services/gateway/console/session.py for what stays of it."""

    def __init__(self, house: House) -> None:
        self._house = house

    def routes(self) -> list[Route]:
        """All of them."""
        return [
            Route(LOGIN_PATH, self.show, methods=["GET"]),
            Route(LOGIN_PATH, self.sign_in, methods=["POST"]),
            self._house.route("/logout", sign_out, post=True),
        ]

    async def show(self, request: Request) -> Response:
        """GET /console/login"""
        session = self._house.vault.read(request, LOGIN_COOKIE) or Session()
        return self._page(request, session, _next(request.query_params.get("next", "")))

    async def sign_in(self, request: Request) -> Response:
        """POST /console/login: takes a key that a service knows."""
        form = await forms.read(request, self._house.settings)
        before, way = self._house.vault.read(request, LOGIN_COOKIE), _next(form.text("next"))
        if before is None or not before.owns(form.text(forms.CSRF_FIELD)):
            return self._page(request, Session(), way, forged())
        key = form.text("key")
        try:
            if not _KEY.fullmatch(key) or len(key) > LONGEST_KEY:
                raise Refused(400, "INVALID_ARGUMENT", f"A key has 1 to {LONGEST_KEY} characters and no blanks.")
            context.authorization.set(f"Bearer {key}")
            await self._house.client.keys.whoami()
        except (CodegraftError, Refused) as error:
            return self._page(request, before, way, error)
        response = RedirectResponse(way, 303)
        self._house.vault.write(response, Session(key), secure=is_https(request))
        return response

    def _page(
        self, request: Request, session: Session, way: str, error: CodegraftError | Refused | None = None
    ) -> Response:
        status = status_of(error) if error else 200
        page = self._house.pages.page(
            "login.html",
            status,
            csrf=session.csrf,
            next=way,
            error=error,
            hint="" if status == 401 else getattr(error, "hint", ""),  # it tells programs where they have their key
            home=PATH,
            project="",
            base="",
            place="login",
        )
        self._house.vault.write(page, session, secure=is_https(request))
        return page


async def sign_out(visit: Visit) -> Response:
    """POST /console/logout"""
    response = visit.done(LOGIN_PATH)
    end(response)
    return response


def _next(way: str) -> str:
    return way if _OWN.fullmatch(way) else PATH
