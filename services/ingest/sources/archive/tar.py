"""tar, strictly forwards: ustar, pax, GNU and V7 headers (POSIX.1-2017 pax, GNU tar manual, "Basic Tar Format")."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from services.core.errors import BrokenArchive, LimitExceeded
from services.ingest.files import FoundFile, Skipped
from services.ingest.limits import Meter
from services.ingest.sources.archive.inflate import Stream
from services.ingest.sources.archive.member import Member, take

BLOCK = 512
EXTENDED_BYTES = 64 << 10
"""Longest pax or GNU long-name record: path names of 4 KiB fit many times."""
GLOBAL_RECORDS = 64
"""Global pax headers of one archive; git writes one."""

_WHY = {b"1": "hardlink", b"2": "symlink", b"3": "device", b"4": "device", b"6": "device", b"S": "sparse"}
_HINT = "Make it anew and upload it again."


def read(stream: Stream, subpath: str, meter: Meter) -> Iterator[FoundFile | Skipped]:
    """The regular files.

    Raises:
        BrokenArchive: a header is damaged, or the archive ends without its end marker.
        LimitExceeded: over a limit.
    """
    reader = _Blocks(stream)
    extended: dict[str, str] = {}
    shared: dict[str, str] = {}
    globals_seen = 0
    while (header := _header(reader, is_first=meter.files == 0)) is not None:
        meter.count_file()
        if header.kind in (b"x", b"X"):
            extended |= _records(reader.extended(header.size))
        elif header.kind == b"g":
            globals_seen += 1
            if globals_seen > GLOBAL_RECORDS:
                raise LimitExceeded("the archive has too many global headers", hint=_HINT)
            # Only what is of use is kept, so that a million of keys weigh nothing.
            shared |= {key: text for key, text in _records(reader.extended(header.size)).items() if key in _USED}
        elif header.kind in (b"L", b"K"):
            text = reader.extended(header.size).split(b"\0", 1)[0].decode(errors="surrogateescape")
            extended["path" if header.kind == b"L" else "linkpath"] = text
        else:
            yield from _entry(reader, header, shared | extended, subpath, meter)
            extended = {}
    if extended:
        raise BrokenArchive("the archive ends behind an extended header", hint=_HINT)
    while stream.read(1 << 20):  # the checksum of a compressed archive stands at its end
        pass


_USED = {"path", "size"}


@dataclass(frozen=True, slots=True)
class _Header:
    name: str
    mode: int
    size: int
    kind: bytes
    scattered: bool


def _entry(
    reader: _Blocks, header: _Header, records: dict[str, str], subpath: str, meter: Meter
) -> Iterator[FoundFile | Skipped]:
    name = records.get("path", header.name)
    size = _pax_size(records["size"]) if "size" in records else header.size
    if header.kind == b"5" or (header.kind in (b"0", b"\0") and name.endswith("/")):  # V7 marks folders by the slash
        _Content(reader, size).finish()
        return
    why = "sparse" if any(key.startswith("GNU.sparse.") for key in records) else _WHY.get(header.kind)
    if header.scattered:
        raise BrokenArchive("a sparse member is too scattered", hint="Pack it without --sparse.")
    if why is None and header.kind not in (b"0", b"\0", b"7"):
        why = "device"
    if why is not None:
        # Links carry no data whatever their size field says; pax lets a hard link have some, GNU tar writes 0.
        _Content(reader, 0 if header.kind in (b"1", b"2", b"3", b"4", b"6") else size).finish()
        yield Skipped(why)
        return
    content = _Content(reader, size)
    yield take(Member(name, header.mode, size), content, subpath, meter)
    content.finish()


def is_header(block: bytes) -> bool:
    """Whether the first block of a file is a tar header, or that of an empty archive, told by its checksum."""
    return len(block) == BLOCK and (_checksum_fits(block) or not block.strip(b"\0"))


def _checksum_fits(block: bytes) -> bool:
    try:
        stored = _number(block[148:156])
    except ValueError:
        return False
    return stored == sum(block[:148]) + 8 * 32 + sum(block[156:]) or stored == _signed_sum(block)


def _header(reader: _Blocks, *, is_first: bool) -> _Header | None:
    """The next header; None at the end marker."""
    block = reader.block()
    if not block.strip(b"\0"):
        return None
    if not _checksum_fits(block):
        if is_first:
            raise BrokenArchive(
                "what is compressed is no tar archive, or a damaged one",
                hint="Compress a tar, or add a single file as it is.",
            )
        raise BrokenArchive("a tar header is damaged (its checksum is wrong)", hint=_HINT)
    kind = block[156:157]
    try:
        size, mode = _number(block[124:136]), _number(block[100:108])
    except ValueError:
        raise BrokenArchive("a tar header has a field that is no number", hint=_HINT) from None
    if size < 0:
        raise BrokenArchive("a tar member has a negative size", hint=_HINT)
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    # With more maps behind the header it is unclear where the data begins.
    scattered = kind == b"S" and block[482:483] not in (b"\0", b"0")
    return _Header(name.decode(errors="surrogateescape"), mode & 0o7777, size, kind, scattered)


def _signed_sum(block: bytes) -> int:
    """Old tars summed signed characters."""
    return sum(byte - 256 if byte > 127 else byte for byte in block[:148] + block[156:]) + 8 * 32


def _number(field: bytes) -> int:
    """An octal field, or GNU's base 256.

    Raises:
        ValueError: it is neither.
    """
    if field[0] & 0x80:
        value = int.from_bytes(field, "big", signed=True) if field[0] == 0xFF else int.from_bytes(field[1:], "big")
        if abs(value) > 1 << 62:
            raise ValueError("out of range")
        return value
    digits = field.split(b"\0", 1)[0].strip()
    if digits and not all(0x30 <= byte <= 0x37 for byte in digits):
        raise ValueError("no octal digits")
    return int(digits or b"0", 8)


def _pax_size(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise BrokenArchive("a pax header has a size that is none", hint=_HINT)
    return int(text)


def _records(data: bytes) -> dict[str, str]:
    """The records "length key=value\\n" of a pax header."""
    found: dict[str, str] = {}
    at = 0
    while at < len(data) and data[at]:  # zeros behind the last record are padding
        space = data.find(b" ", at, at + 8)
        digits = data[at:space]
        if space < 0 or not digits.isdigit():
            raise BrokenArchive("a pax header is damaged", hint=_HINT)
        end = at + int(digits)
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end <= space or end > len(data) or not equals or data[end - 1 : end] != b"\n":
            raise BrokenArchive("a pax header is damaged", hint=_HINT)
        found[key.decode(errors="surrogateescape")] = value.decode(errors="surrogateescape")
        at = end
    return found


class _Blocks:
    """The archive in blocks of 512 bytes."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            data = self._stream.read(size - len(parts))
            if not data:
                raise BrokenArchive("the archive ends too early: it may be cut off", hint="Upload the whole archive.")
            parts += data
        return bytes(parts)

    def block(self) -> bytes:
        return self.exactly(BLOCK)

    def extended(self, size: int) -> bytes:
        if size > EXTENDED_BYTES:
            raise LimitExceeded(
                f"the archive has an extended header of {size:,} bytes", hint="Pack it with plain tar options."
            )
        data = self.exactly(size)
        self.exactly(-size % BLOCK)
        return data

    def skip(self, size: int) -> None:
        left = size
        while left:
            data = self._stream.read(min(left, 1 << 20))
            if not data:
                raise BrokenArchive("the archive ends too early: it may be cut off", hint="Upload the whole archive.")
            left -= len(data)


class _Content:
    """The data of one member; what nobody read is passed over at the end, with the padding to the next block."""

    def __init__(self, reader: _Blocks, size: int) -> None:
        self._reader = reader
        self._left = size
        self._padding = -size % BLOCK

    def read(self, size: int) -> bytes:
        data = self._reader.exactly(min(size, self._left, 1 << 20))
        self._left -= len(data)
        return data

    def finish(self) -> None:
        self._reader.skip(self._left + self._padding)
        self._left = self._padding = 0
