"""The accepted and rejected logs: filtered pages of verdicts.parquet."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from services.core.errors import InvalidPageSize, InvalidPageToken
from services.core.masks import Masks
from services.scanner.verdict import Verdict

DEFAULT_PAGE = 50
LARGEST_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Filter:
    """Which verdicts; the fields are combined with "and", and what is left empty admits all."""

    accepted: bool | None = None
    reasons: frozenset[str] = frozenset()
    languages: frozenset[str] = frozenset()
    path: str = ""
    """A .gitignore pattern."""
    min_loss: float | None = None
    max_loss: float | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Some verdicts."""

    verdicts: list[Verdict]
    next_page_token: str
    total: int
    """How many match the filter in all."""


def page(file: Path | None, scan: str, wanted: Filter, page_size: int, page_token: str) -> Page:
    """One page of a scan's verdicts, by source and path. Reads the file; for a thread.

    Args:
        file: its verdicts.parquet; None while there is none.
        scan: its name; a token of another scan is refused.
        page_size: 0 means 50; more than 1,000 means 1,000.

    Raises:
        InvalidPageSize: below zero.
        InvalidPageToken: not given out for this scan and filter.
        InvalidMask: the filter's path is no pattern.
    """
    if page_size < 0:
        raise InvalidPageSize(
            f"page_size is {page_size}", field="page_size", hint="Use 0 for the default or a positive number."
        )
    scope = _scope(scan, wanted)
    first = _parse_token(page_token, scope) if page_token else 0
    size = min(page_size or DEFAULT_PAGE, LARGEST_PAGE)
    mask = Masks([wanted.path] if wanted.path else [], field="filter.path")
    if file is None:
        return Page([], "", 0)
    table = _matching(pq.read_table(file), wanted, mask)
    rows = [Verdict.of_row(row) for row in table.slice(first, size).to_pylist()]
    after = first + len(rows)
    return Page(rows, _token(after, scope) if after < table.num_rows else "", table.num_rows)


def _matching(table: pa.Table, wanted: Filter, mask: Masks) -> pa.Table:
    if wanted.accepted is not None:
        table = table.filter(pc.equal(table["accepted"], wanted.accepted))
    if wanted.reasons:
        table = table.filter(pc.is_in(table["reason"], pa.array(sorted(wanted.reasons))))
    if wanted.languages:
        table = table.filter(pc.is_in(table["language"], pa.array(sorted(wanted.languages))))
    if wanted.min_loss is not None:
        table = table.filter(pc.greater_equal(table["loss"], wanted.min_loss))
    if wanted.max_loss is not None:
        table = table.filter(pc.less_equal(table["loss"], wanted.max_loss))
    if mask:
        table = table.filter(pa.array(_matches(mask, table["path"].to_pylist()), pa.bool_()))
    return table


def _matches(mask: Masks, paths: Iterable[str]) -> list[bool]:
    return [mask.match(path) is not None for path in paths]


def _scope(scan: str, wanted: Filter) -> str:
    fields = [value for _, value in sorted(asdict(wanted).items())]
    plain = [sorted(value) if isinstance(value, frozenset) else value for value in fields]
    return hashlib.sha256(json.dumps([scan, plain]).encode()).hexdigest()[:16]


def _token(position: int, scope: str) -> str:
    # Verdicts never change once they are written, so a position is stable.
    return base64.urlsafe_b64encode(json.dumps([scope, position]).encode()).decode()


def _parse_token(token: str, scope: str) -> int:
    try:
        match json.loads(base64.urlsafe_b64decode(token.encode("ascii"))):
            case [str(given), int(position)] if given == scope and position > 0:
                return position
    except (UnicodeError, binascii.Error, ValueError):
        pass
    raise InvalidPageToken(
        "page_token was not given out by this list",
        field="page_token",
        hint="Pass the next_page_token of the page before with the same parent and filter, or none.",
    )
