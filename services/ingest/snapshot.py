"""Snapshots: the listings of all sources, with the split each file was given, as one immutable thing."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from codegraft.common.v1.split_pb2 import Split
from codegraft.ingest.v1.project_pb2 import Project
from codegraft.ingest.v1.snapshot_pb2 import (
    FILE_CHANGE_ADDED,
    FILE_CHANGE_MODIFIED,
    FILE_CHANGE_REMOVED,
    FILE_CHANGE_SPLIT,
    FileChange,
    SnapshotFile,
    SnapshotManifest,
    SnapshotSource,
)
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
        ("pack", pa.string()),
        ("offset", pa.int64()),
    ]
)
DIGITS = 16
"""Hexadecimal digits of the digest in a snapshot's name."""


@dataclass(frozen=True, slots=True)
class Part:
    """One source's share of a snapshot."""

    source: Source
    project: Project
    """Its masks come before the source's own."""
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
        byte_count=sum(file.content.size for file in part.files),
        exclude=[*part.project.exclude, *source.exclude],
        include=source.include or part.project.include,
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

    The digest covers sources, masks, splits and files, and nothing of when or in which order they came, or where their
    contents are stored.
    """
    ordered = sorted(parts, key=lambda part: part.source.name)
    sources = [describe(part) for part in ordered]
    columns: dict[str, list[object]] = {name: [] for name in _SCHEMA.names}
    sha256 = hashlib.sha256()
    for source in sources:
        sha256.update(source.SerializeToString(deterministic=True) + b"\0")
    for part in ordered:
        splits = Splits(part.source.split, part.source.split_rules)
        for file in part.files:
            split, content = splits.of(file.path), file.content
            told = f"{content.sha256} {file.mode:o} {split} {part.source.name} "
            sha256.update(told.encode() + file.path.encode() + b"\0")
            row = (
                file.path,
                part.source.name,
                content.size,
                content.sha256,
                file.mode,
                Split.Name(split).removeprefix("SPLIT_"),
                content.place.pack,
                content.place.offset,
            )
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    digest = sha256.hexdigest()
    manifest = SnapshotManifest(
        name=f"{project}/snapshots/{digest[:DIGITS]}",
        digest=digest,
        sources=sources,
        file_count=sum(len(part.files) for part in ordered),
        byte_count=sum(source.byte_count for source in sources),
    )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pydict(columns, schema=_SCHEMA), buffer, compression="zstd")
    return manifest, buffer.getvalue()


def read_table(path: Path) -> pa.Table:
    """files.parquet, by source and path."""
    return pq.read_table(path, schema=_SCHEMA)


def files(table: pa.Table, begin: int = 0, end: int | None = None) -> list[SnapshotFile]:
    """Some of its rows."""
    return [
        SnapshotFile(
            path=row["path"],
            source=row["source"],
            size=row["size"],
            sha256=row["sha256"],
            mode=row["mode"],
            split=f"SPLIT_{row['split']}",
        )
        for row in table.slice(begin, None if end is None else end - begin).to_pylist()
    ]


def packs(table: pa.Table) -> set[str]:
    """The packs that hold the contents."""
    return set(table.column("pack").unique().to_pylist())


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs between two snapshots, as row numbers."""

    change: FileChange
    before: int | None
    after: int | None


def diff(base: pa.Table, target: pa.Table) -> list[Difference]:
    """The files that differ, by source and path."""
    old, new = _keys(base), _keys(target)
    found: list[tuple[tuple[str, str], Difference]] = []
    for key in old.keys() | new.keys():
        before, after = old.get(key), new.get(key)
        if before is None and after is not None:
            found.append((key, Difference(FILE_CHANGE_ADDED, None, after[0])))
        elif after is None and before is not None:
            found.append((key, Difference(FILE_CHANGE_REMOVED, before[0], None)))
        elif before is not None and after is not None and before[1:] != after[1:]:
            change = FILE_CHANGE_MODIFIED if before[1:3] != after[1:3] else FILE_CHANGE_SPLIT
            found.append((key, Difference(change, before[0], after[0])))
    return [difference for _, difference in sorted(found, key=lambda pair: pair[0])]


def _keys(table: pa.Table) -> dict[tuple[str, str], tuple[int, str, int, str]]:
    """(source, path) -> (row, sha256, mode, split)."""
    columns = [table.column(name).to_pylist() for name in ("source", "path", "sha256", "mode", "split")]
    return {
        (source, path): (row, sha256, mode, split)
        for row, (source, path, sha256, mode, split) in enumerate(zip(*columns, strict=True))
    }
