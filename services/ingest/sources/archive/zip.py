"""zip, by its central directory (PKWARE's APPNOTE 6.3.10), after proof that its members do not share bytes."""

from __future__ import annotations

import stat
import struct
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from services.core.errors import BrokenArchive
from services.ingest.files import FoundFile, Skipped
from services.ingest.limits import Meter
from services.ingest.sources.archive.inflate import Inflated, Plain, Stream, bzip2_decompressor, deflate_decompressor
from services.ingest.sources.archive.member import Member, take

SIGNATURES = (b"PK\x03\x04", b"PK\x05\x06")
"""How a zip begins: with its first member, or with the end record when it is empty."""

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX32, _MAX16 = 0xFFFFFFFF, 0xFFFF
_ENCRYPTED, _UTF8 = 0x1, 0x800
_STORED, _DEFLATED, _BZIP2 = 0, 8, 12
_HINT = "Make it anew and upload it again."


@dataclass(frozen=True, slots=True)
class _Directory:
    """The central directory."""

    offset: int
    size: int
    entries: int
    shift: int
    """Bytes before the archive, as in front of a self-extracting one: offsets count from behind them."""


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    mode: int
    method: int
    flags: int
    checksum: int
    packed: int
    """Compressed bytes."""
    size: int
    offset: int
    """Of the local header."""


def read(file: BinaryIO, subpath: str, meter: Meter) -> Iterator[FoundFile | Skipped]:
    """The regular files.

    Raises:
        BrokenArchive: it is damaged, encrypted, or members overlap.
        LimitExceeded: over a limit.
    """
    directory = _find_directory(file)
    _check_overlap(file, directory, meter)
    for entry in _entries(file, directory):
        meter.count_file()
        if entry.name.endswith("/"):
            continue
        kind = stat.S_IFMT(entry.mode)
        if kind not in (0, stat.S_IFREG):
            yield Skipped("symlink" if kind == stat.S_IFLNK else "device")
            continue
        yield take(Member(entry.name, entry.mode & 0o7777, entry.size), _content(file, entry, meter), subpath, meter)


def _find_directory(file: BinaryIO) -> _Directory:
    length = file.seek(0, 2)
    tail_at = max(0, length - _END.size - _MAX16)
    file.seek(tail_at)
    tail = file.read()
    at = _end_record(tail)
    _, disk, first_disk, here, entries, size, offset, _ = _END.unpack_from(tail, at)
    end_at = tail_at + at
    if _MAX16 in (here, entries) or _MAX32 in (size, offset):
        file.seek(max(0, end_at - _LOCATOR64.size))
        signature, _, end64_at, _ = _LOCATOR64.unpack(_exactly(file, _LOCATOR64.size))
        if signature == b"PK\x06\x07":
            file.seek(min(end64_at, length))
            signature, _, _, _, disk, first_disk, here, entries, size, offset = _END64.unpack(
                _exactly(file, _END64.size)
            )
            end_at = end64_at
            if signature != b"PK\x06\x06":
                raise BrokenArchive("the archive's zip64 end record is damaged", hint=_HINT)
    if disk or first_disk or here != entries:
        raise BrokenArchive("the archive is one part of several", hint="Join the parts, or make one archive.")
    shift = end_at - size - offset
    if shift < 0 or size < entries * _ENTRY.size:
        raise BrokenArchive("the archive's directory does not fit into the file", hint=_HINT)
    return _Directory(offset + shift, size, entries, shift)


def _end_record(tail: bytes) -> int:
    """Where the end record begins. A comment may look like one: the right one's comment reaches just to the end."""
    at = len(tail) - _END.size + 4
    while (at := tail.rfind(b"PK\x05\x06", 0, max(at, 0))) >= 0:
        *_, comment = _END.unpack_from(tail, at)
        if at + _END.size + comment == len(tail):
            return at
    raise BrokenArchive("the archive has no end record: it may be cut off", hint="Upload the whole archive.")


def _check_overlap(file: BinaryIO, directory: _Directory, meter: Meter) -> None:
    """Members that share bytes make a bomb of any size out of a small file (Fifield 2019): none may.

    Sixteen bytes a member are held, for a million members no more than a picture.
    """
    if directory.entries > meter.limits.max_files:
        meter.files = meter.limits.max_files
        meter.count_file()
    offsets, spans = array("Q"), array("Q")
    for entry in _entries(file, directory):
        meter.check_time()
        if entry.offset + _LOCAL.size + entry.packed > directory.offset:
            raise BrokenArchive("a member of the archive reaches into its directory", hint=_HINT)
        offsets.append(entry.offset)
        spans.append(_LOCAL.size + entry.packed)
    end = 0
    for number in sorted(range(len(offsets)), key=offsets.__getitem__):
        if offsets[number] < end:
            raise BrokenArchive("members of the archive overlap", hint=_HINT)
        end = offsets[number] + spans[number]


def _entries(file: BinaryIO, directory: _Directory) -> Iterator[_Entry]:
    at = directory.offset
    for _ in range(directory.entries):
        file.seek(at)
        fixed = _ENTRY.unpack(_exactly(file, _ENTRY.size))
        signature, _, _, flags, method, _, _, checksum, packed, size = fixed[:10]
        name_length, extra_length, comment_length, _, _, attributes, offset = fixed[10:]
        if signature != b"PK\x01\x02":
            raise BrokenArchive("the archive's directory is damaged", hint=_HINT)
        name = _exactly(file, name_length)
        if _MAX32 in (packed, size, offset):
            size, packed, offset = _zip64(_exactly(file, extra_length), size, packed, offset)
        at += _ENTRY.size + name_length + extra_length + comment_length
        if at > directory.offset + directory.size:
            raise BrokenArchive("the archive's directory is damaged", hint=_HINT)
        yield _Entry(
            name=_name(name, flags),
            mode=attributes >> 16,
            method=method,
            flags=flags,
            checksum=checksum,
            packed=packed,
            size=size,
            offset=offset + directory.shift,
        )


def _name(raw: bytes, flags: int) -> str:
    """UTF-8 where the archive says so, or where it is; else what zip had in 1989."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode(errors="surrogateescape") if flags & _UTF8 else raw.decode("cp437")


def _zip64(extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        at += 4
        if tag == 1:
            field = extra[at : at + length]
            wanted = [value == _MAX32 for value in (size, packed, offset)]
            if len(field) < 8 * sum(wanted):
                break
            numbers = iter(struct.unpack_from(f"<{sum(wanted)}Q", field))
            size, packed, offset = (
                next(numbers) if want else value for want, value in zip(wanted, (size, packed, offset), strict=True)
            )
            return size, packed, offset
        at += length
    raise BrokenArchive("the archive's zip64 sizes are damaged", hint=_HINT)


def _content(file: BinaryIO, entry: _Entry, meter: Meter) -> Stream:
    """The member's bytes, inflated and checked; nothing is read before someone asks for it."""
    if entry.flags & _ENCRYPTED:
        raise BrokenArchive("the archive is encrypted", hint="Make it without a password.")
    file.seek(entry.offset)
    local = _LOCAL.unpack(_exactly(file, _LOCAL.size))
    if local[0] != b"PK\x03\x04":
        raise BrokenArchive("a member of the archive is not where its directory says", hint=_HINT)
    source = _Part(file, file.tell() + local[9] + local[10], entry.packed)
    inflated: Stream
    if entry.method == _STORED:
        inflated = Plain(source, meter)
    elif entry.method == _DEFLATED:
        inflated = Inflated(source, deflate_decompressor, meter, repeated=False)
    elif entry.method == _BZIP2:
        inflated = Inflated(source, bzip2_decompressor, meter, repeated=False)
    else:
        raise BrokenArchive(
            f"the archive uses compression method {entry.method}, which is not read",
            hint="Make it with `zip` and its default settings.",
        )
    return _Checked(inflated, entry.checksum, entry.name)


class _Part:
    """A stretch of the file."""

    def __init__(self, file: BinaryIO, at: int, size: int) -> None:
        self._file = file
        self._at = at
        self._left = size

    def read(self, size: int) -> bytes:
        self._file.seek(self._at)
        data = self._file.read(min(size, self._left))
        self._at += len(data)
        self._left -= len(data)
        return data


class _Checked:
    """Compares the CRC-32 once the end is reached."""

    def __init__(self, inner: Stream, checksum: int, name: str) -> None:
        self._inner = inner
        self._checksum = checksum
        self._name = name
        self._found = 0

    def read(self, size: int) -> bytes:
        data = self._inner.read(size)
        self._found = zlib.crc32(data, self._found)
        if not data and self._found != self._checksum:
            raise BrokenArchive(f"the archive's member {self._name[-200:]!r} is damaged", hint=_HINT)
        return data


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise BrokenArchive("the archive ends too early", hint="Upload the whole archive.")
    return data
