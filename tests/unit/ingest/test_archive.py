"""Archives: every format, and every way in which one can be hostile."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import zstandard

from services.core.errors import BrokenArchive, LimitExceeded
from services.ingest.files import FoundFile, Skipped
from services.ingest.limits import Limits, Meter
from services.ingest.sources import archive

FILES = {"src/app.py": b"print('hello')\n", "README.md": b"# hello\n", "empty.py": b""}


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_of(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return buffer.getvalue()


def read(tmp_path: Path, data: bytes, limits: Limits | None = None, subpath: str = "") -> list[FoundFile | Skipped]:
    path = tmp_path / "archive"
    path.write_bytes(data)
    return list(archive.read(path, subpath, Meter(limits or Limits())))


PACKERS = {
    "tar": lambda files: tar_of(files),
    "tar.gz": lambda files: gzip.compress(tar_of(files)),
    "tar.bz2": lambda files: bz2.compress(tar_of(files)),
    "tar.xz": lambda files: lzma.compress(tar_of(files)),
    "tar.zst": lambda files: zstandard.compress(tar_of(files)),
    "zip": lambda files: zip_of(files),
    "zip stored": lambda files: zip_of(files, zipfile.ZIP_STORED),
}


@pytest.mark.parametrize("kind", PACKERS)
def test_reads_every_format_by_its_content(tmp_path: Path, kind: str) -> None:
    found = read(tmp_path, PACKERS[kind](FILES))
    assert {file.path: file.data for file in found if isinstance(file, FoundFile)} == FILES
    assert archive.is_archive(tmp_path / "archive")


@pytest.mark.parametrize("kind", PACKERS)
def test_subpath_is_the_new_root(tmp_path: Path, kind: str) -> None:
    found = read(tmp_path, PACKERS[kind](FILES), subpath="src")
    assert [file.path for file in found if isinstance(file, FoundFile)] == ["app.py"]


@pytest.mark.parametrize("kind", PACKERS)
def test_truncated_is_broken(tmp_path: Path, kind: str) -> None:
    noise = bytes(i * 7919 % 251 for i in range(30_000))
    packed = PACKERS[kind]({"noise.bin": noise, **FILES})
    with pytest.raises(BrokenArchive) as caught:
        read(tmp_path, packed[: len(packed) // 2])
    assert caught.value.hint


def test_text_is_no_archive(tmp_path: Path) -> None:
    with pytest.raises(BrokenArchive, match="no archive of a known format"):
        read(tmp_path, b"#!/bin/sh\necho no\n" * 100)


@pytest.mark.parametrize(
    "name",
    [
        "../evil.py",
        "/etc/passwd",
        "a/../../evil.py",
        "C:/evil.py",
        "a\\evil.py",
        ".git/config",
        "x/.GIT/config",
        "a\x01b.py",
        "abc\u202etxt.py",
        "a//b.py",
    ],
)
def test_unsafe_names_are_left_out(tmp_path: Path, name: str) -> None:
    found = read(tmp_path, tar_of({name: b"x = 1\n", "good.py": b"x = 1\n"}))
    assert found == [Skipped("unsafe-path"), FoundFile("good.py", b"x = 1\n")]


def test_links_and_devices_are_left_out(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (
            ("s", tarfile.SYMTYPE),
            ("h", tarfile.LNKTYPE),
            ("d", tarfile.CHRTYPE),
            ("f", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    found = read(tmp_path, buffer.getvalue())
    assert found == [Skipped("symlink"), Skipped("hardlink"), Skipped("device"), Skipped("device")]


def test_zip_symlink_is_left_out(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        packed.writestr(info, "/etc/passwd")
    assert read(tmp_path, buffer.getvalue()) == [Skipped("symlink")]


BOMBS = {
    "gzip": lambda data: gzip.compress(data),
    "bzip2": lambda data: bz2.compress(data),
    "xz": lambda data: lzma.compress(data),
    "zstd": lambda data: zstandard.compress(data),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_stopped_by_what_it_inflates_to(tmp_path: Path, kind: str) -> None:
    bomb = BOMBS[kind](tar_of({"zeros.py": bytes(48 << 20)}))
    with pytest.raises(LimitExceeded):
        read(tmp_path, bomb, Limits(max_total_bytes=4 << 20))


def test_a_bomb_is_stopped_by_its_ratio(tmp_path: Path) -> None:
    with pytest.raises(LimitExceeded, match="times its size"):
        read(tmp_path, zip_of({"zeros.py": bytes(48 << 20)}), Limits(max_file_bytes=64 << 20))


def test_members_are_counted(tmp_path: Path) -> None:
    many = {f"{number}.py": b"" for number in range(50)}
    for packed in (tar_of(many), zip_of(many)):
        with pytest.raises(LimitExceeded, match="files"):
            read(tmp_path, packed, Limits(max_files=40))


def test_large_members_are_left_out(tmp_path: Path) -> None:
    found = read(tmp_path, tar_of({"big.bin": bytes(2000), "a.py": b"a"}), Limits(max_file_bytes=1000))
    assert found == [Skipped("oversize"), FoundFile("a.py", b"a")]


def test_overlapping_zip_is_broken(tmp_path: Path) -> None:
    """Several members of the central directory that share one compressed stream (a zip quine's trick)."""
    packed = bytearray(zip_of({"a.py": bytes(range(256)) * 40}, zipfile.ZIP_STORED))
    directory = packed.index(b"PK\x01\x02")
    end = packed.index(b"PK\x05\x06")
    entry = bytes(packed[directory:end])
    tail = bytearray(packed[end:])
    tail[8:12] = struct.pack("<HH", 3, 3)
    tail[12:16] = struct.pack("<I", 3 * len(entry))
    with pytest.raises(BrokenArchive):
        read(tmp_path, bytes(packed[:directory]) + entry * 3 + bytes(tail))


def test_encrypted_zip_is_broken(tmp_path: Path) -> None:
    packed = bytearray(zip_of({"a.py": b"x = 1\n"}))
    packed[6] |= 1
    packed[packed.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(BrokenArchive):
        read(tmp_path, bytes(packed))


def test_lfs_pointers_are_told_apart(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n"
    assert read(tmp_path, tar_of({"model.bin": pointer})) == [Skipped("lfs-pointer")]
