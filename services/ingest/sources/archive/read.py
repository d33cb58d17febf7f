"""Which format an archive has, told by its first bytes, and its reader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from services.core.errors import BrokenArchive
from services.ingest.files import FoundFile, Skipped
from services.ingest.limits import Meter
from services.ingest.sources.archive import tar, zip
from services.ingest.sources.archive.inflate import (
    ERRORS,
    Inflated,
    Plain,
    Stream,
    Zstandard,
    bzip2_decompressor,
    damaged,
    gzip_decompressor,
    xz_decompressor,
)

FORMATS = "zip, tar, tar.gz, tar.bz2, tar.xz and tar.zst"


def read(path: Path, subpath: str, meter: Meter) -> Iterator[FoundFile | Skipped]:
    """The regular files of an archive.

    Raises:
        BrokenArchive: it is truncated, corrupt, encrypted or of no known format.
        LimitExceeded: it inflates to more than the limits allow; raised as soon as that is read.
    """
    with path.open("rb") as file:
        head = _head(file)
        try:
            if head.startswith(zip.SIGNATURES):
                yield from zip.read(file, subpath, meter)
            else:
                yield from tar.read(_inflated(file, head, meter), subpath, meter)
        except ERRORS as error:
            raise damaged(error) from None


def is_archive(path: Path) -> bool:
    """Whether the file begins as an archive does."""
    with path.open("rb") as file:
        head = _head(file)
        try:
            return head.startswith(zip.SIGNATURES) or bool(_inflated(file, head, Meter()))
        except BrokenArchive:
            return False


def _head(file: BinaryIO) -> bytes:
    head = file.read(tar.BLOCK)
    file.seek(0)
    return head


def _inflated(file: BinaryIO, head: bytes, meter: Meter) -> Stream:
    if head.startswith(b"\x1f\x8b"):
        return Inflated(file, gzip_decompressor, meter)
    if head.startswith(b"BZh"):
        return Inflated(file, bzip2_decompressor, meter)
    if head.startswith(b"\xfd7zXZ\0"):
        return Inflated(file, xz_decompressor, meter)
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return Zstandard(file, meter)
    if tar.is_header(head):
        return Plain(file, meter)
    raise BrokenArchive("this is no archive of a known format", hint=f"{FORMATS} are read.")
