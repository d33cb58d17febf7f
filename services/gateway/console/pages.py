"""Templates, and what every page has in its head."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse

from services.gateway.console import words

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types codegraft-parts"
)
"""Nothing from elsewhere and nothing inline; no script makes HTML of text but static/live.js of the server's."""
HEADERS = {
    "content-security-policy": _POLICY,
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    # Of another site's page no referrer is told where people are; same-origin is for the Origin header of forms, which
    # no-referrer turns into "null".
    "referrer-policy": "same-origin",
}


class Pages:
    """Renders pages and parts of them."""

    def __init__(self) -> None:
        self._templates = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters.update(words.FILTERS)
        self._templates.globals["share"] = words.share

    def part(self, template: str, **values: object) -> str:
        """HTML of a piece of a page."""
        return self._templates.get_template(template).render(values)

    def page(self, template: str, status: int = 200, /, **values: object) -> HTMLResponse:
        """A whole page."""
        return HTMLResponse(self.part(template, **values), status, HEADERS)
