"""The files of one source at one moment: what a fetch leaves behind. Contents are in packs, this is their list."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
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
_HASHED_ROWS = 1 << 16
"""Rows whose text is in memory at once while they are hashed."""


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


class Listing:
    """Files by path, each path once. Immutable.

    Columns instead of objects: what a sync of one file costs must not be the handling of a million others.

    Attributes:
        table: path, size, sha256, mode, pack, offset, object_id; sorted by path.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @classmethod
    def of(cls, files: Iterable[ListedFile]) -> Listing:
        """Of several files of one path the last counts, as when an archive is unpacked."""
        by_path = {file.path: file for file in files}
        return cls(_table(by_path[path] for path in sorted(by_path)))

    def replaced(self, removed: Collection[str], files: Iterable[ListedFile]) -> Listing:
        """The listing without some paths, and with files that take the place of those of the same path."""
        new = Listing.of(files)
        gone = pa.chunked_array([pa.array(list(removed), pa.string()), *new.table["path"].chunks])
        kept = self.table.filter(pc.invert(pc.is_in(self.table["path"], gone)))
        return Listing(pa.concat_tables([kept, new.table]).sort_by("path"))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __iter__(self) -> Iterator[ListedFile]:
        columns = (self.table[name].to_pylist() for name in _SCHEMA.names)
        for path, size, sha256, mode, pack, offset, object_id in zip(*columns, strict=True):
            yield ListedFile(path, mode, Content(size, sha256, Place(pack, offset)), object_id)

    @property
    def byte_count(self) -> int:
        """Bytes of all files together."""
        return pc.sum(self.table["size"]).as_py() or 0

    @cached_property
    def digest(self) -> str:
        """SHA-256 over paths, modes and contents, in hexadecimal; where the bytes are stored does not count."""
        sha256 = hashlib.sha256()
        table = self.table
        hash_rows(sha256, [table["sha256"], octal(table["mode"]), table["size"]], table["path"])
        return sha256.hexdigest()

    def contents(self, by: Literal["sha256", "object_id"], values: Iterable[str]) -> dict[str, Content]:
        """The stored contents that have one of the digests or of git's ids."""
        wanted = pa.array(list(values), pa.string())
        if not len(wanted):
            return {}
        rows = self.table.filter(pc.is_in(self.table[by], wanted))
        columns = (rows[name].to_pylist() for name in (by, "size", "sha256", "pack", "offset"))
        return {
            value: Content(size, sha256, Place(pack, offset))
            for value, size, sha256, pack, offset in zip(*columns, strict=True)
        }

    def object_ids(self) -> frozenset[str]:
        """git's ids of the contents."""
        return frozenset(self.table["object_id"].to_pylist()) - {""}

    def packs(self) -> set[str]:
        """The packs that hold the contents."""
        return set(self.table["pack"].unique().to_pylist())

    def to_parquet(self) -> bytes:
        """As a Parquet file; the same listing gives the same bytes."""
        return to_parquet(self.table)

    @classmethod
    def from_parquet(cls, data: bytes) -> Listing:
        """The listing that :meth:`to_parquet` wrote."""
        return cls(pq.read_table(io.BytesIO(data), schema=_SCHEMA))


EMPTY = Listing(_SCHEMA.empty_table())


def key(source: str, digest: str) -> str:
    """Object key of a source's listing."""
    return f"{source}/listings/{digest}.parquet"


def to_parquet(table: pa.Table) -> bytes:
    """A table of files. Digests and paths hardly repeat: a dictionary of them is but time."""
    repeated = [name for name in table.column_names if name not in ("path", "sha256", "object_id", "size", "offset")]
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", use_dictionary=repeated)
    return buffer.getvalue()


def hash_rows(hasher: Any, columns: list[pa.ChunkedArray], path: pa.ChunkedArray) -> None:
    """Feeds a line for each row to a hash of hashlib: the columns as text, each with a blank behind it; path; NUL."""
    texts = [*(pc.cast(column, pa.string()) for column in columns), path]
    table = pa.table(texts, [str(number) for number in range(len(texts))])
    for batch in table.to_batches(_HASHED_ROWS):
        if not batch.num_rows:
            continue
        *parts, last = batch.columns
        lines = pc.binary_join_element_wise(*(x for part in parts for x in (part, " ")), last, "\0", "")
        _, offsets, text = lines.buffers()
        ends = memoryview(offsets).cast("i")
        hasher.update(memoryview(text)[ends[lines.offset] : ends[lines.offset + len(lines)]])


def octal(modes: pa.ChunkedArray) -> pa.ChunkedArray:
    """Modes as git writes them."""
    known = modes.unique()
    return pa.array([f"{mode:o}" for mode in known.to_pylist()], pa.string()).take(
        pc.index_in(modes, known).combine_chunks()
    )


def _table(files: Iterable[ListedFile]) -> pa.Table:
    rows = [
        (f.path, f.content.size, f.content.sha256, f.mode, f.content.place.pack, f.content.place.offset, f.object_id)
        for f in files
    ]
    columns = zip(*rows, strict=True) if rows else [()] * len(_SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=_SCHEMA)
