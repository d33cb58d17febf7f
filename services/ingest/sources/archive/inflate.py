"""Decompression with bounds: never more memory than asked for, and every byte counted, in and out."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import BinaryIO, Protocol, cast

import zstandard

from services.core.errors import BrokenArchive, LimitExceeded
from services.ingest.limits import Meter

INPUT = 64 << 10
"""Compressed bytes that are read at once."""
OUTPUT = 1 << 20
"""Inflated bytes that are made at once."""
XZ_MEMORY = 160 << 20
ZSTD_WINDOW = 128 << 20
"""A forged header could ask for gigabytes of dictionary; the strongest usual settings stay below these."""

ERRORS = (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError, OSError, ValueError)
"""What the decompressors raise on damaged input."""


class Stream(Protocol):
    """Anything with bytes to read forwards."""

    def read(self, size: int, /) -> bytes:
        """At most so many bytes; empty at the end."""


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Deflate:
    """zlib's decompressor with the interface of bz2's and lzma's."""

    def __init__(self, window_bits: int) -> None:
        self._inner = zlib.decompressobj(window_bits)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


def gzip_decompressor() -> _Decompressor:
    """For one member of a .gz."""
    return _Deflate(zlib.MAX_WBITS | 16)


def deflate_decompressor() -> _Decompressor:
    """For one deflated member of a .zip."""
    return _Deflate(-zlib.MAX_WBITS)


def bzip2_decompressor() -> _Decompressor:
    """For one stream of a .bz2."""
    return bz2.BZ2Decompressor()


def xz_decompressor() -> _Decompressor:
    """For one stream of an .xz."""
    return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=XZ_MEMORY)


class Plain:
    """Bytes as they are, counted."""

    def __init__(self, source: Stream, meter: Meter) -> None:
        self._source = source
        self._meter = meter

    def read(self, size: int) -> bytes:
        data = self._source.read(min(size, OUTPUT))
        self._meter.count_bytes(len(data))
        return data


class Inflated:
    """The inflated bytes of one or more compressed streams in a row, as gzip, bzip2 and xz allow them.

    Raises on reading:
        BrokenArchive: the data ends too early or is damaged.
        LimitExceeded: it is over a limit, or wants too much memory.
    """

    def __init__(
        self, source: Stream, make: Callable[[], _Decompressor], meter: Meter, *, repeated: bool = True
    ) -> None:
        self._source = source
        self._make = make
        self._meter = meter
        self._repeated = repeated
        self._decompressor = make()
        self._pending = b""
        self._ended = False

    def read(self, size: int) -> bytes:
        wanted = min(size, OUTPUT)
        while not self._ended and wanted:
            if self._decompressor.eof and not self._next():
                break
            if self._decompressor.needs_input and not self._pending:
                self._pending = self._input()
                if not self._pending:
                    raise BrokenArchive("the compressed data ends too early", hint="Upload the whole archive.")
            given, self._pending = self._pending, b""
            data = self._decompress(given, wanted)
            self._meter.count_bytes(len(data))
            if data:
                return data
        return b""

    def _decompress(self, data: bytes, size: int) -> bytes:
        try:
            return self._decompressor.decompress(data, size)
        except ERRORS as error:
            raise damaged(error) from None

    def _next(self) -> bool:
        """Goes on to a further stream, if there is one; zeros behind the last are padding."""
        rest = self._decompressor.unused_data
        while self._repeated:
            rest = rest.lstrip(b"\0") or self._input()
            if not rest:
                break
            if rest.strip(b"\0"):
                self._pending = rest.lstrip(b"\0")
                self._decompressor = self._make()
                return True
        self._ended = True
        return False

    def _input(self) -> bytes:
        data = self._source.read(INPUT)
        self._meter.compressed += len(data)
        self._meter.check_time()
        return data


class _Counted:
    """The compressed file, counted as the library reads it."""

    def __init__(self, source: BinaryIO, meter: Meter) -> None:
        self._source = source
        self._meter = meter

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        self._meter.compressed += len(data)
        return data


class Zstandard:
    """The inflated bytes of a .zst. See Inflated for what reading raises."""

    def __init__(self, source: BinaryIO, meter: Meter) -> None:
        self._meter = meter
        counted = cast(BinaryIO, _Counted(source, meter))
        decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
        self._reader = decompressor.stream_reader(counted, read_size=INPUT, read_across_frames=True)

    def read(self, size: int) -> bytes:
        try:
            data = self._reader.read(min(size, OUTPUT))
        except ERRORS as error:
            raise damaged(error) from None
        self._meter.count_bytes(len(data))
        return data


def damaged(error: Exception) -> BrokenArchive | LimitExceeded:
    """What a decompressor's complaint means to the one who uploaded the archive."""
    text = str(error) or type(error).__name__
    if "memory" in text.lower():
        return LimitExceeded(
            "unpacking the archive would take too much memory", hint="Compress it anew with default settings."
        )
    return BrokenArchive(f"the archive is broken: {text}", hint="Make it anew and upload it again.")
