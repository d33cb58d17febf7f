"""Snapshots: the listings of all sources, with the split each file was given, as one immutable thing."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from codegraft.common.v1.split_pb2 import Split
from codegraft.ingest.v1.snapshot_pb2 import SnapshotFile, SnapshotManifest, SnapshotSource
from codegraft.ingest.v1.source_pb2 import Source, SplitRule
from services.core.masks import Masks
from services.ingest.listing import ListedFile

_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("source", pa.string()),
        ("size", pa.int64()),
        ("sha256", pa.string()),
        ("mode", pa.int32()),
        ("split", pa.string()),
    ]
)
DIGITS = 16
"""Hexadecimal digits of the digest in a snapshot's name."""


@dataclass(frozen=True, slots=True)
class Part:
    """One source's share of a snapshot."""

    source: Source
    exclude: Sequence[str]
    """Masks of the project; the source's own follow them."""
    files: Sequence[ListedFile]
    """Sorted by path."""


class Splits:
    """Which split a file of a source gets: that of the last rule that matches, else the source's."""

    def __init__(self, split: Split, rules: Sequence[SplitRule]) -> None:
        self._split = split or Split.SPLIT_AUTO
        self._rules = [(Masks([rule.pattern], field="split_rules.pattern"), rule.split) for rule in reversed(rules)]

    def of(self, path: str) -> Split:
        """The split of the file."""
        for masks, split in self._rules:
            if masks.match(path) is not None:
                return split or Split.SPLIT_AUTO
        return self._split


def describe(part: Part) -> SnapshotSource:
    """What the manifest says of one source."""
    source = part.source
    return SnapshotSource(
        source=source.name,
        origin=origin_of(source),
        commit=source.commit,
        content_digest=source.content_digest,
        file_count=len(part.files),
        byte_count=sum(file.size for file in part.files),
        exclude=[*part.exclude, *source.exclude],
        include=source.include,
        honour_gitattributes=source.honour_gitattributes,
    )


def origin_of(source: Source) -> str:
    """Where a source comes from, for people: its URL or its upload."""
    match source.WhichOneof("origin"):
        case "git":
            return source.git.url
        case "url":
            return source.url.url
        case "bundle":
            return source.bundle.upload
        case "archive":
            return source.archive.upload
        case _:
            return source.file.upload


def build(project: str, parts: Sequence[Part]) -> tuple[SnapshotManifest, bytes]:
    """The manifest (its name made of its digest) and files.parquet.

    The digest covers sources, masks, splits and files, and nothing of when or in which order they came.
    """
    ordered = sorted(parts, key=lambda part: part.source.name)
    sources = [describe(part) for part in ordered]
    rows = list(_rows(ordered))
    sha256 = hashlib.sha256()
    for source in sources:
        sha256.update(source.SerializeToString(deterministic=True) + b"\0")
    for row in rows:
        sha256.update(f"{row.sha256} {row.mode:o} {row.split} {row.source} ".encode() + row.path.encode() + b"\0")
    digest = sha256.hexdigest()
    manifest = SnapshotManifest(
        name=f"{project}/snapshots/{digest[:DIGITS]}",
        digest=digest,
        sources=sources,
        file_count=len(rows),
        byte_count=sum(row.size for row in rows),
    )
    return manifest, _parquet(rows)


def read_files(data: bytes) -> list[SnapshotFile]:
    """The rows of files.parquet."""
    return [
        SnapshotFile(
            path=row["path"],
            source=row["source"],
            size=row["size"],
            sha256=row["sha256"],
            mode=row["mode"],
            split=f"SPLIT_{row['split']}",
        )
        for row in pq.read_table(io.BytesIO(data), schema=_SCHEMA).to_pylist()
    ]


def _rows(parts: Sequence[Part]) -> Iterator[SnapshotFile]:
    for part in parts:
        splits = Splits(part.source.split, part.source.split_rules)
        for file in part.files:
            yield SnapshotFile(
                path=file.path,
                source=part.source.name,
                size=file.size,
                sha256=file.sha256,
                mode=file.mode,
                split=splits.of(file.path),
            )


def _parquet(rows: Sequence[SnapshotFile]) -> bytes:
    table = pa.Table.from_pydict(
        {
            "path": [row.path for row in rows],
            "source": [row.source for row in rows],
            "size": [row.size for row in rows],
            "sha256": [row.sha256 for row in rows],
            "mode": [row.mode for row in rows],
            "split": [Split.Name(row.split).removeprefix("SPLIT_") for row in rows],
        },
        schema=_SCHEMA,
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
