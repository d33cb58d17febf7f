"""What every command prints, and what its exit code means.

Results go to stdout: tables for people, or JSON with ``--json`` (one value, or a line per message from what streams).
Progress and errors go to stderr, so that stdout can always be piped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Annotated, TypeVar

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.core.errors import Code, CodegraftError

out = Console(markup=False, highlight=False, soft_wrap=True)
err = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on with every change, until Ctrl-C.")]
M = TypeVar("M", bound=Message)


class ExitCode(IntEnum):
    """Exit codes of every command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    PRECONDITION = 4
    UNAVAILABLE = 5
    DENIED = 6
    INTERRUPTED = 130


EXIT_CODES = (
    "Exit codes: 0 done; 1 failed; 2 wrong usage or invalid value; 3 not found; 4 not possible in the present state; "
    "5 a service cannot be reached or is busy; 6 not allowed: no key, or one that may not; 130 interrupted."
)

_EXIT_BY_CODE = {
    Code.INVALID_ARGUMENT: ExitCode.USAGE,
    Code.OUT_OF_RANGE: ExitCode.USAGE,
    Code.NOT_FOUND: ExitCode.NOT_FOUND,
    Code.ALREADY_EXISTS: ExitCode.PRECONDITION,
    Code.FAILED_PRECONDITION: ExitCode.PRECONDITION,
    Code.ABORTED: ExitCode.PRECONDITION,
    Code.UNAVAILABLE: ExitCode.UNAVAILABLE,
    Code.DEADLINE_EXCEEDED: ExitCode.UNAVAILABLE,
    Code.RESOURCE_EXHAUSTED: ExitCode.UNAVAILABLE,
    Code.UNAUTHENTICATED: ExitCode.DENIED,
    Code.PERMISSION_DENIED: ExitCode.DENIED,
    Code.CANCELLED: ExitCode.INTERRUPTED,
}


def fail(error: CodegraftError, *, as_json: bool) -> ExitCode:
    """Tells about an error on stderr: what went wrong, and the way out. Returns the exit code for it."""
    if as_json:
        described = {
            "code": error.code.value,
            "reason": error.reason,
            "message": error.message,
            "field": error.field,
            "hint": error.hint,
            "metadata": error.metadata,
        }
        err.print(json.dumps({"error": described}))
    else:
        err.print(Text.assemble(("error: ", "bold red"), error.message))
        if error.hint:
            err.print(Text.assemble(("hint:  ", "bold"), error.hint))
    return _EXIT_BY_CODE.get(error.code, ExitCode.FAILED)


def print_json(value: object) -> None:
    """One JSON value on a line of its own. Messages keep the field names of their protos."""
    sys.stdout.write(json.dumps(plain(value), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def plain(value: object) -> object:
    """The value with every proto message in it as a dict, enums by name and unset fields shown."""
    if isinstance(value, Message):
        return MessageToDict(value, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
    """A table; numbers are right-aligned.

    Args:
        columns: headings.
        rows: cells; None is shown as a dash.
        empty: what to say when there are no rows.
    """
    rows = list(rows)
    if not rows:
        err.print(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        is_number = all(isinstance(row[index], int | float | None) for row in rows)
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell_text(cell)) for cell in row))
    out.print(table)


def print_changes(changes: Iterable[M], row: Callable[[M], Sequence[object]], *, as_json: bool) -> None:
    """What goes on, a line a change: the cells of :func:`print_table`, without its headings."""
    for change in changes:
        if as_json:
            print_json(change)
        else:
            out.print("  ".join(map(cell_text, row(change))))


def cell_text(cell: object) -> str:
    """A cell for people: losses and shares with four digits, counts with thousands separated."""
    if cell is None or cell == "":
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:.4f}"
    return str(cell)
