"""Reading a snapshot from the object store: its files and the masks of its sources."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from codegraft.ingest.v1.snapshot_pb2 import SnapshotManifest, SnapshotSource
from services.core.errors import ArtifactNotFound, SnapshotNotFound
from services.core.masks import Masks
from services.core.store import Artifacts, Place
from services.scanner.rules import Rules
from services.scanner.stage1 import SourceMasks
from services.scanner.verdict import Split

FILES = "files.parquet"
_COLUMNS = ["source", "path", "size", "sha256", "split", "pack", "offset"]


@dataclass(frozen=True, slots=True)
class File:
    """One file of a snapshot."""

    source: str
    path: str
    size: int
    sha256: str
    split: Split
    """TRAIN, TEST or AUTO."""
    place: Place


async def manifest(artifacts: Artifacts, name: str) -> SnapshotManifest:
    """The manifest of a snapshot.

    Raises:
        SnapshotNotFound: there is none of that name.
    """
    try:
        return await artifacts.manifest(name, SnapshotManifest)
    except ArtifactNotFound:
        raise SnapshotNotFound(
            f"there is no snapshot {name}", field="snapshot", hint="Take one with SnapshotService.CreateSnapshot."
        ) from None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot that is open."""

    manifest: SnapshotManifest
    table: pa.Table
    """Its files, by source and path."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def files(self, begin: int = 0, end: int | None = None) -> list[File]:
        """Some of its files."""
        return _files(self.table.slice(begin, None if end is None else end - begin))

    def named(self, source: str, name: str) -> list[File]:
        """The files of a source that have this name, in whatever folder."""
        path = self.table["path"]
        is_named = pc.or_(pc.equal(path, name), pc.ends_with(path, "/" + name))
        return _files(self.table.filter(pc.and_(pc.equal(self.table["source"], source), is_named)))


async def fetch(artifacts: Artifacts, found: SnapshotManifest) -> Snapshot:
    """Opens a snapshot."""
    folder = await artifacts.fetch(found.name, found.files, only=[FILES])
    table = await asyncio.to_thread(pq.read_table, folder / FILES, columns=_COLUMNS)
    return Snapshot(found, table.sort_by([("source", "ascending"), ("path", "ascending")]))


def _files(table: pa.Table) -> list[File]:
    columns = (table[name].to_pylist() for name in _COLUMNS)
    return [
        File(source, path, size, sha256, _split(split), Place(pack, offset))
        for source, path, size, sha256, split, pack, offset in zip(*columns, strict=True)
    ]


def masks(sources: list[SnapshotSource], rules: Rules) -> dict[str, SourceMasks]:
    """The masks that apply to each source.

    Raises:
        InvalidMask: a mask of a source is no pattern.
    """
    force = Masks(rules.force_include, field="settings.force_include")
    return {
        source.source: SourceMasks(
            exclude=Masks([*source.exclude, *rules.exclude]),
            include=Masks(source.include, field="include"),
            force=force,
        )
        for source in sources
    }


def _split(value: str) -> Split:
    return cast(Split, value) if value in ("TRAIN", "TEST") else "AUTO"
