"""Groups of near-duplicates among the files of all shards, on disk.

Two files are linked when some band of their signatures agrees and the estimated similarity of the whole signatures is
over the threshold; a group is what links connect. So it can be a chain: with A like B and B like C, A and C are in one
group however little they share. BigCode groups in the same way (connected components by union-find).

Thousands of files may agree in a band, for instance all that begin with one long licence. Not every two of them are
compared, but each file with the first of them and with the few just before it, in an order that comes from the
signatures alone. Among up to COMPARED + 1 files that is every pair; of more, two that are like each other but not like
the first are linked only if they stand close enough here or in another band, and they mostly share several. Whatever is
linked has been verified. Files with the same signature count as one, so that a thousand copies crowd no band, and what
is in one group already is not compared again.

The groups depend on the signatures alone: not on keys, on the order of the files, on the shards or their number.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from services.scanner import near
from services.scanner.near import Bands

KEY = pa.field("key", pa.int64(), nullable=False)
"""The column with the number that the caller gave the file; no two files of all shards have the same."""
SIGNATURE = pa.field("signature", pa.binary(4 * near.ROWS))
"""The column with the rows as little-endian 32-bit numbers; null for a text without words."""
MARGIN = 0.02
"""By so much an estimate must be over the threshold, one standard deviation of its error. There are many more pairs
just below any threshold than above it, and 0.02 keeps most of those out that are overestimated: of the pairs that reach
0.7 in estimate, 93 % are that similar; of those that reach 0.72, 98 %."""
COMPARED = 4
"""How many files before it in a band a file is compared with, besides the first."""
MEMORY_LIMIT = "384MB"
"""For DuckDB; what it holds beyond that goes to the folder."""

_THREADS = 2
"""Each of DuckDB's threads takes a share of the memory, and there may be a hundred cores."""
_READ = 1 << 12
"""Files read at once."""
_BLOCK = 1 << 12
"""Pairs whose signatures are in memory at once."""
_WHOLE = Bands(1, near.ROWS)

Positions = NDArray[np.int64]


def signature_column(signatures: NDArray[np.uint32]) -> pa.Array:
    """What :func:`near.signatures` gives, as the column of a shard."""
    rows = np.ascontiguousarray(signatures, "<u4")
    values = pa.FixedSizeBinaryArray.from_buffers(SIGNATURE.type, len(rows), [None, pa.py_buffer(rows)])
    return pc.if_else((rows != near.EMPTY).any(axis=1), values, pa.scalar(None, SIGNATURE.type))


@contextmanager
def opened(
    shards: Iterable[Path], folder: Path, *, threshold: float = near.THRESHOLD, memory_limit: str = MEMORY_LIMIT
) -> Iterator[Search]:
    """The files of the shards, ready to be grouped.

    Args:
        shards: Parquet files with the columns KEY and SIGNATURE; others in them are not read.
        folder: for 1,300 bytes a file and whatever DuckDB spills; the caller removes it.
        threshold: the least similarity of two files that are linked.
    """
    bands = near.bands(threshold)
    hashes = [(name, pa.uint64()) for name in ("digest", *map(_column, range(bands.count)))]
    schema = pa.schema([("position", pa.int64()), *hashes])
    keys: list[NDArray[np.int64]] = [np.empty(0, np.int64)]

    def batches(file: IO[bytes]) -> Iterator[pa.RecordBatch]:
        position = 0
        for batch_keys, rows in _read(shards):
            keys.append(batch_keys)
            file.write(rows.data)
            places = np.arange(position, position + len(rows))
            position += len(rows)
            columns = [places, _WHOLE.keys(rows)[:, 0], *bands.keys(rows).T]
            yield pa.record_batch([pa.array(column) for column in columns], schema)

    database = duckdb.connect(
        folder / "bands.duckdb",
        config={
            "memory_limit": memory_limit,
            "temp_directory": str(folder / "spilled"),
            "threads": _THREADS,
        },
    )
    with database:
        database.execute("set enable_progress_bar = false")
        with (folder / "signatures").open("wb") as file:
            database.from_arrow(pa.RecordBatchReader.from_batches(schema, batches(file))).create("files")
        database.execute(
            "create table copies as select position, original from"
            " (select position, min(position) over (partition by digest) as original from files)"
            " where position <> original"
        )
        database.execute("delete from files where position in (select position from copies)")
        yield Search(database, folder / "signatures", np.concatenate(keys), bands, threshold)


@dataclass(frozen=True, slots=True)
class Search:
    """Files by position: their order in the shards, without those that have no words."""

    database: duckdb.DuckDBPyConnection
    """`files`: position, digest of the whole signature, and the bands; `copies`, not among them: position, original."""
    path: Path
    """Of the signatures, one after the other."""
    keys: NDArray[np.int64]
    bands: Bands
    threshold: float

    def groups(self) -> Iterator[tuple[int, int]]:
        """The key of each file that is in a group with others, and the smallest key in that group."""
        forest = Forest(len(self.keys))
        for _ in self._links(forest):
            pass
        smallest = self.keys.copy()
        np.minimum.at(smallest, forest.roots, self.keys)
        sizes = np.bincount(forest.roots)
        for position in np.flatnonzero(sizes[forest.roots] > 1):
            yield int(self.keys[position]), int(smallest[forest.roots[position]])

    def links(self) -> Iterator[tuple[int, int, float]]:
        """Links that connect every group, not all there are: two keys and the estimated similarity of their files."""
        for a, b, similarities in self._links(Forest(len(self.keys))):
            yield from zip(self.keys[a].tolist(), self.keys[b].tolist(), similarities.tolist(), strict=True)

    def similarities(self, pairs: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
        """The estimated similarities of files, linked or not; for instance of those in a group to its survivors.

        Raises:
            LookupError: no file with words has one of the keys.
        """
        wanted = np.array(pairs, np.int64).reshape(-1, 2)
        order = np.argsort(self.keys)
        found = order.take(np.searchsorted(self.keys, wanted, sorter=order), mode="clip")
        if not np.array_equal(self.keys[found], wanted):
            raise LookupError("no file with words has one of the keys")
        return self._compare(found[:, 0], found[:, 1])

    def _links(self, forest: Forest) -> Iterator[tuple[Positions, Positions, NDArray[np.float64]]]:
        """Joins the groups in a forest, and tells by what."""
        for a, b in self._candidates():
            apart = forest.roots[a] != forest.roots[b]
            a, b = a[apart], b[apart]
            similarities = self._compare(a, b)
            alike = similarities >= min(1.0, self.threshold + MARGIN)
            forest.join(a[alike], b[alike])
            yield a[alike], b[alike], similarities[alike]

    def _candidates(self) -> Iterator[tuple[Positions, Positions]]:
        """The pairs to compare unless others have connected them by then."""
        copies = self.database.execute("select original, position from copies").fetchnumpy()
        yield copies["original"], copies["position"]
        for band in range(self.bands.count):
            query = f"select {_column(band)} as band, position from files order by band, digest"
            found = self.database.execute(query).fetchnumpy()
            keys, positions = found["band"], found["position"]
            places = np.arange(len(keys))
            firsts = np.maximum.accumulate(np.where(keys != np.roll(keys, 1), places, 0))
            far = places - firsts > COMPARED
            yield positions[firsts[far]], positions[far]
            for distance in range(1, COMPARED + 1):
                same = keys[distance:] == keys[:-distance]
                yield positions[:-distance][same], positions[distance:][same]

    def _compare(self, a: Positions, b: Positions) -> NDArray[np.float64]:
        similarities = np.empty(len(a))
        with self.path.open("rb") as file:
            for start in range(0, len(a), _BLOCK):
                block = slice(start, start + _BLOCK)
                similarities[block] = near.similarity(_rows(file, a[block]), _rows(file, b[block]))
        return similarities


class Forest:
    """Union-find over many pairs at once."""

    def __init__(self, count: int) -> None:
        self.roots = np.arange(count)
        """The smallest position that each is connected with."""

    def join(self, a: Positions, b: Positions) -> None:
        """Connects each of `a` with its counterpart in `b`."""
        while len(a):
            a, b = self.roots[a], self.roots[b]
            apart = a != b
            a, b = a[apart], b[apart]
            np.minimum.at(self.roots, np.maximum(a, b), np.minimum(a, b))
            while not np.array_equal(above := self.roots[self.roots], self.roots):
                self.roots = above


def _column(band: int) -> str:
    return f"band_{band}"


def _read(shards: Iterable[Path]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint32]]]:
    """Keys and signatures of the files with words."""
    for shard in shards:
        # Without the buffer's size a whole row group is in memory.
        with pq.ParquetFile(shard, pre_buffer=False, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(_READ, columns=[KEY.name, SIGNATURE.name]):
                batch = batch.filter(batch[SIGNATURE.name].is_valid())
                rows = np.frombuffer(b"".join(batch[SIGNATURE.name].to_pylist()), "<u4").reshape(-1, near.ROWS)
                yield batch[KEY.name].to_numpy(), rows


def _rows(file: IO[bytes], positions: Positions) -> NDArray[np.uint32]:
    """The signatures at some positions. Not mapped into memory: what was looked at would count as this process's."""
    rows = np.empty((len(positions), near.ROWS), "<u4")
    for row, position in zip(rows, positions.tolist(), strict=True):
        os.preadv(file.fileno(), [row.data], position * row.nbytes)
    return rows
