"""A corpus of hostile archives: every case by its name, its bytes, and what a safe reader makes of it."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import zstandard

BOMB_BYTES = 64 << 20
MANY_MEMBERS = 65_000
CODE = b"print('hello')\n"

HOSTILE_NAMES = {
    "zip-slip": "../../evil.py",
    "dots inside": "src/../../evil.py",
    "dot alone": "src/./evil.py",
    "absolute": "/etc/cron.d/evil",
    "windows drive": "C:/evil.py",
    "backslashes": "..\\..\\evil.py",
    "a repository's own": ".git/hooks/post-checkout",
    "another spelling of .git": "sub/.GiT/config",
    "control character": "src/evil\x1b[2J.py",
    "newline": "src/evil\n.py",
    "bidi override": "src/evil\u202eyp.exe",
    "zero width": "src/ev\u200bil.py",
    "longer than a path may be": "a/" * 40 + "b" * 5000 + ".py",
    "deeper than folders may be": "d/" * 200 + "evil.py",
    "empty part": "src//evil.py",
    # CVE-2025-4517: realpath() stops resolving at PATH_MAX, so a chain of long names leads out of the folder.
    "PATH_MAX chain": "/".join(["d" * 247] * 16) + "/" + "../" * 16 + "flag",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One archive of the corpus."""

    name: str
    data: bytes
    kept: frozenset[str] = frozenset()
    """Paths that are read in spite of their neighbours."""
    skipped: frozenset[str] = frozenset()
    """Reasons for what is left out."""
    refused: str = ""
    """Reason of the error when the archive is refused as a whole."""
    says: str = ""
    """Part of the error's message, so that the check that is meant refuses it and not another one behind it."""


def corpus() -> Iterator[Case]:
    """Every case; the same bytes each time."""
    yield from _names()
    yield from _members()
    yield from _damaged()
    yield from _forged_zips()
    yield from _bombs()


def tar_of(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of the members as they are, whatever tarfile thinks of them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def regular(name: str, data: bytes = CODE) -> tuple[tarfile.TarInfo, bytes]:
    """A regular member."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


def zip_of(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of the files, under just these names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as packed:
        for name, data in files.items():
            packed.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()


def raw_header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """One tar header whose size field is given as it shall stand, 12 bytes, with a checksum that fits."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = size
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _names() -> Iterator[Case]:
    beside = frozenset({"good.py"})
    unsafe = frozenset({"unsafe-path"})
    for what, name in HOSTILE_NAMES.items():
        yield Case(f"tar: {what}", tar_of(regular(name), regular("good.py")), beside, unsafe)
        yield Case(
            f"gnu tar: {what}", tar_of(regular(name), regular("good.py"), form=tarfile.GNU_FORMAT), beside, unsafe
        )
        yield Case(f"zip: {what}", zip_of({name: CODE, "good.py": CODE}), beside, unsafe)
    surrogate = raw_header(b"src/\xff\xfe.py", b"00000000017\0") + CODE.ljust(512, b"\0")
    yield Case("tar: name that is no UTF-8", surrogate + tar_of(regular("good.py")), beside, unsafe)
    for what, pair in {
        "case-fold collision": ("README.md", "readme.md"),
        "Unicode collision": ("caf\u00e9.py", "cafe\u0301.py"),
    }.items():  # both are kept: nothing is written under its name, so none can take the other's place
        yield Case(f"tar: {what}", tar_of(*(regular(name) for name in pair)), frozenset(pair))
        yield Case(f"zip: {what}", zip_of(dict.fromkeys(pair, CODE)), frozenset(pair))


def _members() -> Iterator[Case]:
    kinds = {
        "symlink": (tarfile.SYMTYPE, "symlink"),
        "hardlink": (tarfile.LNKTYPE, "hardlink"),
        "character device": (tarfile.CHRTYPE, "device"),
        "block device": (tarfile.BLKTYPE, "device"),
        "fifo": (tarfile.FIFOTYPE, "device"),
    }
    for what, (kind, why) in kinds.items():
        info = tarfile.TarInfo("out")
        info.type, info.linkname = kind, "/etc/passwd"
        through = regular("out/through.py")
        yield Case(f"tar: {what}", tar_of((info, b""), through), frozenset({"out/through.py"}), frozenset({why}))
    link = zipfile.ZipInfo("out")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr(link, "/etc/passwd")
        packed.writestr("out/through.py", CODE)
    yield Case("zip: symlink", buffer.getvalue(), frozenset({"out/through.py"}), frozenset({"symlink"}))
    sparse = tarfile.TarInfo("sparse.py")
    sparse.size = len(CODE)
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 50)}
    yield Case("tar: sparse of a petabyte", tar_of((sparse, CODE)), skipped=frozenset({"sparse"}))


def _broken(name: str, data: bytes, says: str) -> Case:
    return Case(name, data, refused="BROKEN_ARCHIVE", says=says)


def _damaged() -> Iterator[Case]:
    minus, end = b"\xff" * 12, bytes(1024)
    two = tar_of(regular("a.py"), regular("b.py"))
    scattered = bytearray(raw_header(b"a.py", b"%011o\0" % len(CODE), b"S"))
    scattered[482:483], scattered[148:156] = b"\1", b" " * 8
    scattered[148:156] = b"%06o\0 " % sum(scattered)
    yield _broken("tar: negative size", raw_header(b"a.py", minus) + end, "negative size")
    yield _broken("tar: folder of negative size", raw_header(b"a/", minus, b"5") + end, "negative size")
    yield _broken("tar: size that is no number", raw_header(b"a.py", b"sizeofmember") + end, "no number")
    yield _broken("tar: size of 8 exabytes", raw_header(b"a.py", b"\x80" + b"\x7f" * 11) + end, "no number")
    yield _broken("tar: first header is damaged", two.replace(b"a.py", b"c.py"), "no archive of a known format")
    yield _broken("gzip: a single file", gzip.compress(CODE * 100, mtime=0), "what is compressed is no tar archive")
    yield _broken("tar: second header is damaged", two.replace(b"b.py", b"c.py"), "checksum is wrong")
    yield _broken("tar: sparse map in many blocks", bytes(scattered) + end, "too scattered")
    yield _broken("tar: pax size of minus one", _pax(b"11 size=-1\n"), "a size that is none")
    yield _broken("tar: pax record of no length", _pax(b"ab path=a\n"), "a pax header is damaged")
    yield _broken("tar: cut off within what is left out", tar_of(regular("../x", bytes(5000)))[:2000], "cut off")
    yield _broken("tar: pax record longer than it is", _pax(b"99999 path=a\n"), "a pax header is damaged")
    yield _broken("tar: ends behind a pax header", _pax(b"10 path=a\n", b"") + end, "behind an extended header")
    noise = bytes(n * 7919 % 251 for n in range(40_000))
    whole = tar_of(regular("noise.bin", noise), regular("b.py"))
    packed = {
        "tar": whole,
        "tar.gz": gzip.compress(whole, mtime=0),
        "tar.bz2": bz2.compress(whole),
        "tar.xz": lzma.compress(whole),
        "tar.zst": zstandard.ZstdCompressor(write_checksum=True).compress(whole),
        "zip": zip_of({"noise.bin": noise, "b.py": CODE}),
    }
    for kind, data in packed.items():
        says = "cut off" if kind in ("tar", "tar.zst", "zip") else "too early"
        yield _broken(f"{kind}: truncated", data[: len(data) // 2], says)
        if kind != "tar":  # a plain tar has no checksum of its contents
            middle = len(data) // 2
            bent = data[:middle] + bytes(byte ^ 0x55 for byte in data[middle : middle + 64]) + data[middle + 64 :]
            yield _broken(f"{kind}: corrupt", bent, "a damaged one" if kind == "tar.bz2" else "broken")


def _pax(records: bytes, behind: bytes = tar_of(regular("a.py"))) -> bytes:
    size = b"%011o\0" % len(records)
    return raw_header(b"pax", size, b"x") + records.ljust(512, b"\0") + behind


def _forged_zips() -> Iterator[Case]:
    """Zips whose directory lies (the kind of CVE-2024-0450)."""
    good = zip_of({"a.py": CODE * 50, "b.py": CODE})
    start = good.index(b"PK\x01\x02")
    second = good.index(b"PK\x01\x02", start + 4)

    def bent(at: int, packed: bytes) -> bytes:
        return good[:at] + packed + good[at + len(packed) :]

    def number(value: int) -> bytes:
        return struct.pack("<L", value)

    end = len(good) - 22
    stored = zip_of({"a.py": CODE}, zipfile.ZIP_STORED)
    yield _broken("zip: overlapping members", bent(second + 42, number(0)), "overlap")
    yield _broken("zip: member in the directory", bent(start + 20, number(start)), "reaches into its directory")
    yield _broken("zip: smaller than it claims", bent(start + 24, number(1_000_000)), "the size that is told")
    yield _broken("zip: larger than it claims", bent(start + 24, number(10)), "the size that is told")
    yield _broken("zip: another checksum", bent(start + 16, number(1)), "is damaged")
    yield _broken("zip: stored bytes changed", stored.replace(CODE, b"P" + CODE[1:]), "is damaged")
    yield _broken("zip: member elsewhere", bent(start + 42, number(4)), "not where its directory says")
    yield _broken("zip: unknown method", bent(start + 10, struct.pack("<H", 99)), "method")
    yield _broken("zip: directory beyond the end", bent(end + 16, number(1 << 31)), "does not fit")
    yield _broken("zip: more members than there are", bent(end + 8, struct.pack("<HH", 3, 3)), "directory")
    yield _broken("zip: second entry damaged", bent(second, b"XX"), "directory is damaged")
    yield _broken("zip: comment longer than the directory", bent(start + 32, b"\xff\xff"), "directory is damaged")
    yield _broken("zip: zip64 sizes missing", bent(start + 24, number(0xFFFFFFFF)), "zip64 sizes are damaged")
    many = good[:end] + b"PK\x06\x07" + number(0) + b"%b" + number(1) + bent(end + 8, b"\xff" * 4)[end:]
    yield _broken("zip: zip64 end record at the start", many.replace(b"%b", bytes(8)), "zip64 end record is damaged")
    yield _broken("zip: zip64 end record behind the end", many.replace(b"%b", b"\x7f" * 8), "ends too early")
    yield _broken("zip: one part of several", bent(end + 4, struct.pack("<H", 1)), "one part of several")
    yield _broken("zip: encrypted", bent(start + 8, struct.pack("<H", 1)), "is encrypted")


def _bombs() -> Iterator[Case]:
    too_much = "LIMIT_EXCEEDED"
    info = tarfile.TarInfo("zeros.py")
    info.size = BOMB_BYTES
    whole = info.tobuf() + bytes(BOMB_BYTES + 1024)
    compressors: dict[str, Callable[[bytes], bytes]] = {
        "gzip": lambda data: gzip.compress(data, mtime=0),
        "bzip2": bz2.compress,
        "xz": lambda data: lzma.compress(data, preset=0),
        "zstd": zstandard.compress,
    }
    for kind, compress in compressors.items():
        yield Case(f"{kind}: bomb", compress(whole), refused=too_much)
    zeros = bytes(BOMB_BYTES // 8)
    yield Case("zip: bomb", zip_of({f"f{n}.py": zeros for n in range(8)}), refused=too_much)
    empty = {f"f{n}.py": b"" for n in range(MANY_MEMBERS)}
    yield Case("zip: 65,000 empty members", zip_of(empty, zipfile.ZIP_STORED), frozenset(empty))
