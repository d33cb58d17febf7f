"""A cursor in a file, as FILE:LINE or FILE:LINE:COLUMN, and the code on both sides of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from services.core.errors import InvalidArgument, NotFound

_FORM = re.compile(r"(?P<file>.+?):(?P<line>[0-9]+)(?::(?P<column>[0-9]+))?")


@dataclass(frozen=True)
class Cursor:
    """Code around a cursor."""

    path: str
    prefix: str
    suffix: str


def read(location: str) -> Cursor:
    """Reads the file. Lines and columns count from 1; without a column the cursor is at the end of the line.

    Raises:
        InvalidArgument: it is not of that form, the position is outside the file, or the file is no UTF-8 text.
        NotFound: there is no such file.
    """
    match = _FORM.fullmatch(location)
    if match is None:
        raise InvalidArgument(
            f"{location!r} is not FILE:LINE or FILE:LINE:COLUMN", field="LOCATION", hint="For example src/app.py:40."
        )
    text = read_text(Path(match["file"]))
    lines = text.splitlines(keepends=True) or [""]
    line = int(match["line"])
    if not 1 <= line <= len(lines):
        raise InvalidArgument(f"{match['file']} has {len(lines)} lines, not {line}", field="LOCATION")
    content = lines[line - 1].rstrip("\r\n")
    column = len(content) + 1 if match["column"] is None else int(match["column"])
    if not 1 <= column <= len(content) + 1:
        raise InvalidArgument(
            f"line {line} of {match['file']} has columns 1 to {len(content) + 1}, not {column}", field="LOCATION"
        )
    position = sum(len(before) for before in lines[: line - 1]) + column - 1
    return Cursor(match["file"], text[:position], text[position:])


def read_text(path: Path) -> str:
    """A text file's content.

    Raises:
        NotFound: there is no such file.
        InvalidArgument: it is no UTF-8 text.
    """
    try:
        return path.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise NotFound(f"there is no file {path}", field=str(path)) from error
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{path} is not UTF-8 text", field=str(path)) from error
