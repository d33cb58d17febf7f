"""Archives, streamed member by member. Nothing is extracted by name, so that no name can do harm."""

from __future__ import annotations

import bz2
import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO, cast

import zstandard

from services.core.errors import BrokenArchive
from services.ingest.files import FoundFile, Skipped, below, found, plain_path
from services.ingest.limits import Limits, Meter

_FORMATS = "zip, tar, tar.gz, tar.bz2, tar.xz and tar.zst"
_CHUNK = 1 << 20
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    zstandard.ZstdError,
    EOFError,
    OSError,
    ValueError,
    NotImplementedError,
    RuntimeError,
    OverflowError,
)
"""What the readers raise on damaged, truncated, encrypted or forged input."""


def read(path: Path, subpath: str, limits: Limits) -> Iterator[FoundFile | Skipped]:
    """The regular files of an archive, its format told by its first bytes.

    Raises:
        BrokenArchive: it is truncated, corrupt, encrypted or of no known format.
        LimitExceeded: it inflates to more than the limits allow; raised as soon as that is read.
    """
    meter = Meter(limits, compressed_bytes=path.stat().st_size)
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(0)
        try:
            if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
                yield from _read_zip(file, subpath, meter)
            else:
                yield from _read_tar(_inflated(file, head), subpath, meter)
        except _BROKEN as error:
            raise BrokenArchive(
                f"the archive is broken: {error or type(error).__name__}",
                hint=f"Make it anew and upload it again; {_FORMATS} are read.",
            ) from None


def is_archive(path: Path) -> bool:
    """Whether the file begins as an archive does."""
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(0)
        if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            return True
        try:
            return bool(_inflated(file, head))
        except BrokenArchive:
            return False


def _inflated(file: BinaryIO, head: bytes) -> IO[bytes]:
    if head.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if head.startswith(b"BZh"):
        return cast(IO[bytes], bz2.BZ2File(file))
    if head.startswith(b"\xfd7zXZ\0"):
        # A forged header could ask for gigabytes of dictionary.
        return cast(IO[bytes], _LimitedXz(file))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        decompressor = zstandard.ZstdDecompressor(max_window_size=128 << 20)
        return cast(IO[bytes], decompressor.stream_reader(file, read_across_frames=True))
    if head[257:262] == b"ustar" or _is_old_tar(head):
        return file
    raise BrokenArchive("this is no archive of a known format", hint=f"{_FORMATS} are read.")


def _is_old_tar(head: bytes) -> bool:
    """Whether the first block has a valid checksum of a tar without magic (V7)."""
    if len(head) < 512:
        return False
    try:
        return int(head[148:156].strip(b" \0") or b"0", 8) == sum(head[:148]) + 8 * 32 + sum(head[156:512])
    except ValueError:
        return False


class _LimitedXz:
    """An .xz stream whose decoder may use 256 MiB at most."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=256 << 20)

    def read(self, size: int = -1) -> bytes:
        wanted = _CHUNK if size < 0 else size
        parts = bytearray()
        while len(parts) < wanted:
            if self._decoder.eof:
                rest = (self._decoder.unused_data or self._file.read(_CHUNK)).lstrip(b"\0")
                if not rest:
                    break
                self._decoder = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=256 << 20)
                parts += self._decoder.decompress(rest, wanted - len(parts))
                continue
            data = self._file.read(_CHUNK) if self._decoder.needs_input else b""
            if not data and self._decoder.needs_input:
                raise EOFError("the compressed data ends too early")
            parts += self._decoder.decompress(data, wanted - len(parts))
        return bytes(parts)


class _Metered:
    """A stream whose bytes are counted against the limits, also those that tarfile only skips."""

    def __init__(self, inner: IO[bytes], meter: Meter) -> None:
        self._inner = inner
        self._meter = meter

    def read(self, size: int = -1) -> bytes:
        data = self._inner.read(min(size, _CHUNK) if size >= 0 else _CHUNK)
        self._meter.count_bytes(len(data))
        return data


def _read_tar(stream: IO[bytes], subpath: str, meter: Meter) -> Iterator[FoundFile | Skipped]:
    # "r|" reads strictly forwards: no seeking, no random access that overlapping members could use.
    with tarfile.open(fileobj=cast(IO[bytes], _Metered(stream, meter)), mode="r|") as tar:
        for member in tar:
            meter.count_file()
            if member.isdir():
                continue
            if member.issym() or member.islnk():
                yield Skipped("symlink" if member.issym() else "hardlink")
                continue
            if not member.isreg() or member.size < 0:
                yield Skipped("device")
                continue
            if member.sparse is not None:
                yield Skipped("sparse")
                continue
            content = tar.extractfile(member)
            # tar tells the size in the header, and a stream of that many bytes follows or the archive is broken.
            yield _member(member.name, member.mode, member.size, content, subpath, meter.limits)
            # tarfile keeps every header otherwise, and a million of them are a gigabyte.
            tar.members.clear()  # type: ignore[attr-defined]


def _read_zip(file: BinaryIO, subpath: str, meter: Meter) -> Iterator[FoundFile | Skipped]:
    with zipfile.ZipFile(file) as archive:
        if len(archive.infolist()) > meter.limits.max_files:
            meter.files = meter.limits.max_files
            meter.count_file()
        claimed = 0
        for member in archive.infolist():
            meter.count_file()
            if member.is_dir():
                continue
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                yield Skipped("symlink" if kind == stat.S_IFLNK else "device")
                continue
            # Members that overlap in the file (David Fifield's bomb) claim more compressed bytes than there are.
            claimed += member.compress_size
            if claimed > meter.compressed_bytes:
                raise zipfile.BadZipFile("its members overlap")
            with archive.open(member) as content:
                metered = cast(IO[bytes], _Metered(content, meter))
                yield _member(
                    member.filename, member.external_attr >> 16, member.file_size, metered, subpath, meter.limits
                )


def _member(
    name: str, mode: int, size: int, content: IO[bytes] | None, subpath: str, limits: Limits
) -> FoundFile | Skipped:
    path = plain_path(name, limits.max_path_bytes)
    if path is None:
        return Skipped("unsafe-path")
    inside = below(path, subpath)
    if inside is None:
        return Skipped("outside-subpath")
    if size > limits.max_file_bytes or content is None:
        return Skipped("oversize")
    data = bytearray()
    while part := content.read(_CHUNK):
        data += part
        if len(data) > limits.max_file_bytes:  # the header lied
            return Skipped("oversize")
    if len(data) < size:
        raise EOFError("a member ends too early")
    return found(inside, bytes(data), mode)
