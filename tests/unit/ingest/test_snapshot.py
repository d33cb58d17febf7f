"""Snapshots: the same content is the same digest, whatever the order; splits and masks are part of it."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from codegraft.common.v1.split_pb2 import Split
from codegraft.ingest.v1.source_pb2 import Source, SplitRule
from services.ingest import listing, snapshot
from services.ingest.listing import ListedFile

NAMES = st.text("abcdef/._", min_size=1, max_size=12)
FILES = st.builds(
    ListedFile, NAMES, st.integers(0, 10**9), st.text("0123456789abcdef", min_size=64, max_size=64), st.just(0o644)
)


def part(name: str, files: list[ListedFile], **fields: object) -> snapshot.Part:
    return snapshot.Part(Source(name=f"projects/p/sources/{name}", **fields), [], listing.unique(files))  # type: ignore[arg-type]


@given(st.lists(st.lists(FILES, max_size=6), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_digest_is_independent_of_order(sources: list[list[ListedFile]], rng: random.Random) -> None:
    parts = [part(f"s{number}", files) for number, files in enumerate(sources)]
    shuffled = [
        part(f"s{number}", rng.sample(listing.unique(files), len(listing.unique(files))))
        for number, files in enumerate(sources)
    ]
    rng.shuffle(shuffled)
    first, table = snapshot.build("projects/p", parts)
    again, same_table = snapshot.build("projects/p", shuffled)
    assert (first, table) == (again, same_table)


@given(st.lists(FILES, max_size=8))
def test_listing_survives_parquet(files: list[ListedFile]) -> None:
    kept = listing.unique(files)
    assert listing.from_parquet(listing.to_parquet(kept)) == kept


@given(st.lists(FILES, min_size=1, max_size=5))
def test_rows_are_read_back(files: list[ListedFile]) -> None:
    manifest, table = snapshot.build("projects/p", [part("s", files)])
    rows = snapshot.read_files(table)
    assert len(rows) == manifest.file_count
    assert [(r.path, r.size, r.sha256, r.mode) for r in rows] == [
        (f.path, f.size, f.sha256, f.mode) for f in listing.unique(files)
    ]


def test_everything_that_matters_changes_the_digest() -> None:
    file = ListedFile("a.py", 1, "0" * 64, 0o644)
    variants = [
        part("s", [file]),
        part("t", [file]),
        part("s", [ListedFile("b.py", 1, "0" * 64, 0o644)]),
        part("s", [ListedFile("a.py", 1, "1" * 64, 0o644)]),
        part("s", [ListedFile("a.py", 1, "0" * 64, 0o755)]),
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
