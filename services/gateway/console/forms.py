"""Forms that browsers send, bounded as all bodies are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from starlette.requests import Request

from services.core.errors import InvalidArgument
from services.gateway.config import GatewaySettings
from services.gateway.edge import body

TYPE = "application/x-www-form-urlencoded"
CSRF_FIELD = "csrf"
CSRF_HEADER = "x-csrf-token"
_FIELDS = 5000
"""Most in a form; that of the languages has two for each."""


@dataclass(frozen=True, slots=True)
class Form:
    """Fields in order, with repeated ones; also of an address's query."""

    pairs: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Never in a log: some are secrets."""

    def text(self, name: str, default: str = "") -> str:
        """The field without blanks around it."""
        return next((value.strip() for key, value in self.pairs if key == name), default)

    def raw(self, name: str) -> str:
        """The field as it is, with the line ends of Unix: a browser sends Windows' ones."""
        return next((value.replace("\r\n", "\n") for key, value in self.pairs if key == name), "")

    def all(self, name: str) -> list[str]:
        """Every value of a repeated field."""
        return [value.strip() for key, value in self.pairs if key == name and value.strip()]

    def lines(self, name: str) -> list[str]:
        """A text area's lines, without empty ones."""
        return [line.strip() for line in self.raw(name).split("\n") if line.strip()]

    def has(self, name: str) -> bool:
        """Whether a box is checked."""
        return any(key == name for key, _ in self.pairs)

    def number(self, name: str) -> float | None:
        """A finite number; None for an empty field.

        Raises:
            InvalidArgument: it is none.
        """
        value = self.text(name)
        if not value:
            return None
        try:
            found = float(value)
            if not math.isfinite(found):
                raise ValueError
            return found
        except ValueError:
            raise InvalidArgument(f"{value[:80]!r} is no number", field=name, hint="Write 12, 0.5 or 1e-4.") from None

    def whole(self, name: str) -> int | None:
        """A whole number; None for an empty field.

        Raises:
            InvalidArgument: it is none.
        """
        value = self.text(name)
        if not value:
            return None
        try:
            return int(value)
        except ValueError:
            raise InvalidArgument(f"{value[:80]!r} is no whole number", field=name, hint="Write 12.") from None


def of_query(request: Request) -> Form:
    """What stands behind the address's question mark."""
    return Form(tuple(request.query_params.multi_items()))


async def read(request: Request, settings: GatewaySettings) -> Form:
    """The request's form.

    Raises:
        Refused: it is too large, too slow, or no form.
        InvalidArgument: it cannot be read.
        ClientGone: the browser went away.
    """
    data = await body.read(request, TYPE, most=settings.gateway_body_bytes, seconds=settings.gateway_body_seconds)
    try:
        pairs = parse_qsl(data.decode(), keep_blank_values=True, max_num_fields=_FIELDS, errors="strict")
    except ValueError:
        raise InvalidArgument("the form cannot be read", hint="Send it in UTF-8, with fewer fields.") from None
    return Form(tuple(pairs))
