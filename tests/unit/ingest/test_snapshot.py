"""Snapshots: the same content is the same digest, whatever the order; splits and masks are part of it."""

from __future__ import annotations

import hashlib
import io
import random

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from codegraft.common.v1.split_pb2 import Split
from codegraft.ingest.v1.project_pb2 import Project
from codegraft.ingest.v1.snapshot_pb2 import SnapshotFile
from codegraft.ingest.v1.source_pb2 import Source, SplitRule
from services.core.store import Place
from services.ingest import snapshot
from services.ingest.listing import Content, ListedFile, Listing

NAMES = st.text("abcdef/._", min_size=1, max_size=12)
SHA256 = st.text("0123456789abcdef", min_size=64, max_size=64)
CONTENTS = st.builds(Content, st.integers(0, 10**9), SHA256, st.builds(Place, SHA256, st.integers(0, 1 << 40)))
FILES = st.builds(ListedFile, NAMES, st.just(0o644), CONTENTS, st.sampled_from(["", "f" * 40]))


def listed(path: str = "a.py", sha256: str = "0" * 64, mode: int = 0o644) -> ListedFile:
    return ListedFile(path, mode, Content(1, sha256, Place("f" * 64, 0)))


def part(name: str, files: list[ListedFile], **fields: object) -> snapshot.Part:
    return snapshot.Part(Source(name=f"projects/p/sources/{name}", **fields), Project(), Listing.of(files))  # type: ignore[arg-type]


@given(st.lists(st.lists(FILES, max_size=6), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_digest_is_independent_of_order(sources: list[list[ListedFile]], rng: random.Random) -> None:
    parts = [part(f"s{number}", files) for number, files in enumerate(sources)]
    unique = [list(Listing.of(files)) for files in sources]
    shuffled = [part(f"s{number}", rng.sample(files, len(files))) for number, files in enumerate(unique)]
    rng.shuffle(shuffled)
    first, table = snapshot.build("projects/p", parts)
    again, same_table = snapshot.build("projects/p", shuffled)
    assert (first, table) == (again, same_table)


@given(st.lists(FILES, max_size=8))
def test_listing_survives_parquet(files: list[ListedFile]) -> None:
    kept = Listing.of(files)
    assert list(kept) == [file for _, file in sorted({file.path: file for file in files}.items())]
    read = Listing.from_parquet(kept.to_parquet())
    assert (list(read), read.digest, len(read)) == (list(kept), kept.digest, len(kept))
    assert kept.byte_count == sum(file.content.size for file in kept)
    assert kept.packs() == {file.content.place.pack for file in kept}


@given(st.lists(FILES, max_size=8), st.lists(FILES, max_size=5), st.sets(NAMES, max_size=5))
def test_replacing_files_is_listing_all_of_them_anew(
    files: list[ListedFile], new: list[ListedFile], removed: set[str]
) -> None:
    gone = removed | {file.path for file in files[::3]}
    replaced = Listing.of(files).replaced(gone, new)
    anew = Listing.of([file for file in files if file.path not in gone] + new)
    assert (list(replaced), replaced.digest) == (list(anew), anew.digest)


@given(st.lists(FILES, max_size=8), st.lists(SHA256, max_size=3))
def test_contents_are_found_by_their_digests(files: list[ListedFile], others: list[str]) -> None:
    listing = Listing.of(files)
    contents = {file.content.sha256: file.content for file in listing}
    assert listing.contents("sha256", [*contents, *others]) == contents
    by_id = listing.contents("object_id", listing.object_ids())
    assert by_id.keys() == {file.object_id for file in listing if file.object_id}


def test_the_digest_is_that_of_lines_of_text() -> None:
    """Pinned: a digest that changes with a release would make every source seem changed."""
    files = [listed("a.py"), listed("b/ü.py", "1" * 64, 0o755)]
    lines = f"{'0' * 64} 644 1 a.py\0{'1' * 64} 755 1 b/ü.py\0"
    assert Listing.of(files).digest == hashlib.sha256(lines.encode()).hexdigest()


@given(st.lists(FILES, min_size=1, max_size=5))
def test_rows_are_read_back(files: list[ListedFile]) -> None:
    manifest, table = snapshot.build("projects/p", [part("s", files)])
    rows = snapshot.files(pq.read_table(io.BytesIO(table)))
    assert len(rows) == manifest.file_count
    assert [(r.path, r.size, r.sha256, r.mode) for r in rows] == [
        (f.path, f.content.size, f.content.sha256, f.mode) for f in Listing.of(files)
    ]


def test_everything_that_matters_changes_the_digest() -> None:
    file = listed()
    variants = [
        part("s", [file]),
        part("t", [file]),
        part("s", [listed("b.py")]),
        part("s", [listed(sha256="1" * 64)]),
        part("s", [listed(mode=0o755)]),
        part("s", [file], split=Split.SPLIT_TEST),
        part("s", [file], exclude=["*.txt"]),
        part("s", [file], commit="c" * 40),
    ]
    digests = {snapshot.build("projects/p", [variant])[0].digest for variant in variants}
    assert len(digests) == len(variants)


def test_the_last_matching_rule_gives_the_split() -> None:
    rules = [
        SplitRule(pattern="tests/**", split=Split.SPLIT_TEST),
        SplitRule(pattern="tests/data/**", split=Split.SPLIT_TRAIN),
    ]
    splits = snapshot.Splits(Split.SPLIT_UNSPECIFIED, rules)
    found = [splits.of(path) for path in ("a.py", "tests/a.py", "tests/data/a.py")]
    assert found == [Split.SPLIT_AUTO, Split.SPLIT_TEST, Split.SPLIT_TRAIN]


def test_where_contents_are_stored_does_not_change_the_digest() -> None:
    here, there = (ListedFile("a.py", 0o644, Content(1, "0" * 64, Place(pack * 64, 7))) for pack in "ab")
    assert Listing.of([here]).digest == Listing.of([there]).digest
    assert snapshot.build("projects/p", [part("s", [here])])[0] == snapshot.build("projects/p", [part("s", [there])])[0]


def row_of(table: pa.Table, number: int | None) -> SnapshotFile | None:
    return None if number is None else snapshot.files(table, number, number + 1)[0]


@given(st.lists(FILES, max_size=8), st.lists(FILES, max_size=8))
def test_a_difference_leads_from_one_snapshot_to_the_other(old: list[ListedFile], new: list[ListedFile]) -> None:
    tables = [pq.read_table(io.BytesIO(snapshot.build("projects/p", [part("s", files)])[1])) for files in (old, new)]
    before, after = ({row.path: row for row in snapshot.files(table)} for table in tables)
    changed = dict(before)
    for difference in snapshot.diff(*tables):
        was = (
            snapshot.files(tables[0], difference.before, difference.before + 1)[0]
            if difference.before is not None
            else None
        )
        row = (
            snapshot.files(tables[1], difference.after, difference.after + 1)[0]
            if difference.after is not None
            else None
        )
        assert was != row
        if row is None:
            assert was is not None
            del changed[was.path]
        else:
            changed[row.path] = row
    assert {path: (row.sha256, row.mode) for path, row in changed.items()} == {
        path: (row.sha256, row.mode) for path, row in after.items()
    }
    assert snapshot.diff(tables[1], tables[1]) == []
