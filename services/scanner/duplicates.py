"""Duplicates among all files of a scan, on disk: the same text, and near-duplicates (near_groups.py).

Works on the Parquet files of stage 1's parts; of a million files only what is found is in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa

from services.scanner import near_groups

_FILES = """
create table files as
select key, fingerprint, sha256, len(reasons) = 0 as clean, split <> 'TEST' as learned, source, path
from read_parquet(?) where fingerprint <> ''
"""
_EXACT = """
create table exact as
select file.key, survivor.key as survivor, file.sha256 = survivor.sha256 as same_bytes from files as file join (
    select fingerprint, min_by(key, (learned, source, path)) as key, min_by(sha256, (learned, source, path)) as sha256
    from files where clean group by fingerprint
) as survivor using (fingerprint) where file.key <> survivor.key
"""
_GROUPED = ["key", "first"]
_NEAR = """
select file.key, min_by(file.key, (learned, source, path)) over (partition by grouped.first) as survivor
from files as file join grouped using (key) where clean and file.key not in (select key from exact)
order by file.key
"""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A file that another one stands for."""

    survivor: int
    """Key of the other."""
    similarity: float
    """1 for the same text, else the estimated Jaccard similarity of the two."""
    how: str
    """In what they are the same."""


def find(shards: Sequence[Path], *, threshold: float) -> dict[int, Duplicate]:
    """Duplicates by their key.

    The survivor of a group is its first clean file by (test before train, source, path): it does not depend on the
    order of the files or the shards, and what a test file holds never stays in train.

    Args:
        shards: as examined.py writes them.
        threshold: least similarity of near-duplicates.
    """
    if not shards:
        return {}
    with tempfile.TemporaryDirectory(prefix="codegraft-duplicates-") as name:
        folder = Path(name)
        with duckdb.connect(
            folder / "files.duckdb",
            config={"memory_limit": near_groups.MEMORY_LIMIT, "temp_directory": str(folder / "spilled")},
        ) as database:
            database.execute("set enable_progress_bar = false")
            database.execute(_FILES, [[str(shard) for shard in shards]])
            database.execute(_EXACT)
            found = {
                key: Duplicate(survivor, 1.0, "same bytes" if same else "same but for line ends and blanks")
                for key, survivor, same in database.execute("select * from exact").fetchall()
            }
            (folder / "near").mkdir()
            with near_groups.opened(shards, folder / "near", threshold=threshold) as search:
                groups = list(search.groups())
                # A single table: inserting row by row takes DuckDB longer than all the rest.
                columns = ([key for key, _ in groups], [first for _, first in groups])
                database.register("grouped", pa.table([pa.array(column, pa.int64()) for column in columns], _GROUPED))
                members = [pair for pair in database.execute(_NEAR).fetchall() if pair[0] != pair[1]]
                for (key, survivor), similarity in zip(members, search.similarities(members).tolist(), strict=True):
                    how = "near-duplicate" if similarity >= threshold else "linked by near-duplicates"
                    found[key] = Duplicate(survivor, similarity, f"{how} ({similarity:.0%} alike)")
    return found
