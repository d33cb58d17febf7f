"""Snapshots: the listings of all sources, with the split each file was given, as one immutable thing."""

from __future__ import annotations

import hashlib
import json
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
from services.ingest.listing import Listing, hash_rows, octal, to_parquet

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
_SPLIT_NAMES = pa.array([Split.Name(n).removeprefix("SPLIT_") for n in range(len(Split.keys()))], pa.string())
DIGITS = 16
"""Hexadecimal digits of the digest in a snapshot's name."""


@dataclass(frozen=True, slots=True)
class Part:
    """One source's share of a snapshot."""

    source: Source
    project: Project
    """Its masks come before the source's own."""
    files: Listing


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

    def of_all(self, paths: pa.ChunkedArray) -> pa.Array:
        """The splits of many files, as numbers."""
        if not self._rules:
            return pa.repeat(pa.scalar(self._split, pa.int32()), len(paths))
        return pa.array([self.of(path) for path in paths.to_pylist()], pa.int32())


def describe(part: Part) -> SnapshotSource:
    """What the manifest says of one source."""
    source = part.source
    return SnapshotSource(
        source=source.name,
        origin=origin_of(source),
        commit=source.commit,
        content_digest=source.content_digest,
        file_count=len(part.files),
        byte_count=part.files.byte_count,
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
    sha256 = hashlib.sha256()
    for source in sources:
        sha256.update(source.SerializeToString(deterministic=True) + b"\0")
    projects = {part.project.name: part.project for part in parts}
    languages_off = sorted({name for one in projects.values() for name in one.languages_off})
    licenses_off = sorted({name for one in projects.values() for name in one.exclude_licenses})
    if languages_off or licenses_off:
        sha256.update(json.dumps([languages_off, licenses_off]).encode() + b"\0")
    tables = []
    for part in ordered:
        table = part.files.table
        splits = Splits(part.source.split, part.source.split_rules).of_all(table["path"])
        source_name = pa.repeat(part.source.name, len(table))
        hash_rows(sha256, [table["sha256"], octal(table["mode"]), splits, source_name], table["path"])
        split_names = _SPLIT_NAMES.take(splits)
        columns = {"source": source_name, "split": split_names}
        tables.append(pa.table([columns[name] if name in columns else table[name] for name in _SCHEMA.names], _SCHEMA))
    digest = sha256.hexdigest()
    manifest = SnapshotManifest(
        name=f"{project}/snapshots/{digest[:DIGITS]}",
        digest=digest,
        sources=sources,
        file_count=sum(len(part.files) for part in ordered),
        byte_count=sum(source.byte_count for source in sources),
        languages_off=languages_off,
        exclude_licenses=licenses_off,
    )
    return manifest, to_parquet(pa.concat_tables(tables))


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
