"""Reading a snapshot from the object store: its files and the masks of its sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import pyarrow.parquet as pq

from codegraft.ingest.v1.snapshot_pb2 import SnapshotManifest, SnapshotSource
from services.core.errors import ArtifactNotFound, SnapshotNotFound
from services.core.masks import Masks
from services.core.store import Artifacts, Place
from services.scanner.rules import Rules
from services.scanner.stage1 import SourceMasks
from services.scanner.verdict import Split

FILES = "files.parquet"


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


async def files(artifacts: Artifacts, found: SnapshotManifest) -> list[File]:
    """The files, by source and path."""
    folder = await artifacts.fetch(found.name, found.files, only=[FILES])
    table = pq.read_table(folder / FILES, columns=["source", "path", "size", "sha256", "split", "pack", "offset"])
    rows = [
        File(
            row["source"],
            row["path"],
            row["size"],
            row["sha256"],
            _split(row["split"]),
            Place(row["pack"], row["offset"]),
        )
        for row in table.to_pylist()
    ]
    return sorted(rows, key=lambda file: (file.source, file.path))


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
