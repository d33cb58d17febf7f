"""The files of one source at one moment: what a fetch leaves behind. Contents are blobs, this is their list."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

_SCHEMA = pa.schema([("path", pa.string()), ("size", pa.int64()), ("sha256", pa.string()), ("mode", pa.int32())])


@dataclass(frozen=True, slots=True, order=True)
class ListedFile:
    """One file."""

    path: str
    size: int
    """In bytes."""
    sha256: str
    """Of its content, which is the blob of that digest."""
    mode: int
    """0o644 or 0o755."""


def unique(files: Iterable[ListedFile]) -> list[ListedFile]:
    """By path; of several members of one name the last counts, as when an archive is unpacked."""
    return sorted({file.path: file for file in files}.values())


def digest(files: Iterable[ListedFile]) -> str:
    """SHA-256 over a sorted listing."""
    sha256 = hashlib.sha256()
    for file in files:
        sha256.update(f"{file.sha256} {file.mode:o} {file.size} ".encode() + file.path.encode() + b"\0")
    return sha256.hexdigest()


def to_parquet(files: Iterable[ListedFile]) -> bytes:
    """The listing as a Parquet file; the same listing gives the same bytes."""
    rows = [{"path": f.path, "size": f.size, "sha256": f.sha256, "mode": f.mode} for f in files]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(data: bytes) -> list[ListedFile]:
    """The listing that :func:`to_parquet` wrote."""
    table = pq.read_table(io.BytesIO(data), schema=_SCHEMA)
    return [ListedFile(row["path"], row["size"], row["sha256"], row["mode"]) for row in table.to_pylist()]
