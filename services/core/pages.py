"""Pages of an immutable list: a token is a position, and belongs to the one list it came from."""

from __future__ import annotations

import hashlib

from services.core.errors import InvalidPageSize, InvalidPageToken
from services.core.state.table import DEFAULT_PAGE, LARGEST_PAGE


def bounds(page_size: int, page_token: str, scope: str) -> tuple[int, int]:
    """First index of the page, and the one behind its last.

    Raises:
        InvalidPageSize: below zero.
        InvalidPageToken: not given out for this list.
    """
    if page_size < 0:
        raise InvalidPageSize(
            f"page_size is {page_size}", field="page_size", hint="Use 0 for the default or a positive number."
        )
    begin = 0
    if page_token:
        mark, _, position = page_token.partition("-")
        if mark != _mark(scope) or not (position.isascii() and position.isdigit() and len(position) < 12):
            raise InvalidPageToken(
                "page_token was not given out by this list",
                field="page_token",
                hint="Pass the next_page_token of the page before with the same parent, or none.",
            )
        begin = int(position)
    return begin, begin + min(page_size or DEFAULT_PAGE, LARGEST_PAGE)


def token(position: int, scope: str) -> str:
    """The token of the page that begins there."""
    return f"{_mark(scope)}-{position}"


def _mark(scope: str) -> str:
    return hashlib.sha256(scope.encode()).hexdigest()[:12]
