"""The files of one source at one moment: what a fetch leaves behind. Contents are in packs, this is their list."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from services.core.store import Place

_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),
        ("sha256", pa.string()),
        ("mode", pa.int32()),
        ("pack", pa.string()),
        ("offset", pa.int64()),
        ("object_id", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Content:
    """Stored bytes of a file."""

    size: int
    """In bytes."""
    sha256: str
    place: Place


@dataclass(frozen=True, slots=True)
class ListedFile:
    """One file."""

    path: str
    mode: int
    """0o644 or 0o755."""
    content: Content
    object_id: str = ""
    """git's id of the content; empty for what is not git."""


def unique(files: Iterable[ListedFile]) -> list[ListedFile]:
    """By path; of several members of one name the last counts, as when an archive is unpacked."""
    by_path = {file.path: file for file in files}
    return [by_path[path] for path in sorted(by_path)]


def digest(files: Iterable[ListedFile]) -> str:
    """SHA-256 over a sorted listing; where the bytes are stored does not count."""
    sha256 = hashlib.sha256()
    for file in files:
        content = file.content
        sha256.update(f"{content.sha256} {file.mode:o} {content.size} ".encode() + file.path.encode() + b"\0")
    return sha256.hexdigest()


def key(source: str, digest: str) -> str:
    """Object key of a source's listing."""
    return f"{source}/listings/{digest}.parquet"


def to_parquet(files: Sequence[ListedFile]) -> bytes:
    """The listing as a Parquet file; the same listing gives the same bytes."""
    table = pa.Table.from_pydict(
        {
            "path": [file.path for file in files],
            "size": [file.content.size for file in files],
            "sha256": [file.content.sha256 for file in files],
            "mode": [file.mode for file in files],
            "pack": [file.content.place.pack for file in files],
            "offset": [file.content.place.offset for file in files],
            "object_id": [file.object_id for file in files],
        },
        schema=_SCHEMA,
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(data: bytes) -> list[ListedFile]:
    """The listing that :func:`to_parquet` wrote."""
    columns = pq.read_table(io.BytesIO(data), schema=_SCHEMA).to_pydict()
    return [
        ListedFile(path, mode, Content(size, sha256, Place(pack, offset)), object_id)
        for path, size, sha256, mode, pack, offset, object_id in zip(
            *(columns[name] for name in _SCHEMA.names), strict=True
        )
    ]
