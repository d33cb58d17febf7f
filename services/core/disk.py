"""A full disk, told as what it is: in which folder, and what to do about it."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from services.core.errors import CodegraftError, DiskFull

_NUMBERS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_WORDS = tuple(os.strerror(number) for number in sorted(_NUMBERS))
"""Libraries in other languages, and git, give the system's words in errors of their own."""


def full(error: BaseException, folder: Path | None = None) -> DiskFull | None:
    """The error as DiskFull when a full disk is behind it; None when it is something else.

    Args:
        folder: in which it was written; None takes what the error names, else the system's for temporary files.
    """
    number = error.errno if isinstance(error, OSError) else None
    why = os.strerror(number) if number in _NUMBERS and number is not None else complaint(str(error))
    if not why or isinstance(error, CodegraftError):
        return None
    if folder is None:
        named = error.filename if isinstance(error, OSError) else None
        folder = Path(os.fsdecode(named)).parent if isinstance(named, str | bytes) else Path(tempfile.gettempdir())
    return DiskFull.of(folder, why)


def complaint(text: str) -> str:
    """The words with which a text says that a disk is full; empty when it does not."""
    return next((words for words in _WORDS if words in text), "")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises DiskFull, which names the folder, in place of whatever a full disk makes of writing there."""
    try:
        yield
    except Exception as error:
        if (told := full(error, folder)) is None:
            raise
        raise told from error
