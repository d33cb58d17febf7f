"""Duplicates over all parts of a scan: nothing of a test file stays in train, whatever the order and the parts."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.core.masks import Masks
from services.core.store import Place
from services.scanner import examined, pipeline
from services.scanner.pipeline import Entry
from services.scanner.rules import Rules
from services.scanner.snapshot import File
from services.scanner.stage1 import SourceMasks
from services.scanner.verdict import Finding, Reason, Split

NOTHING = SourceMasks(Masks([]), Masks([]), Masks([]))
LINES = [f"def function_{n}(value):\n    return value * {n} + {n % 7}\n" for n in range(60)]
ONE, OTHER = "".join(LINES[:30]), "".join(LINES[30:])
TEXTS = {
    "one": ONE,
    "one with other line ends": ONE.replace("\n", "  \r\n"),
    "almost one": ONE + "# and a last word\n",
    "one with a line less": ONE.replace(LINES[3], ""),
    "other": OTHER,
    "half of each": "".join(LINES[15:45]),
    "lots of digits": "1234567890 " * 40,
}


def examine(path: str, kind: str, split: Split = "AUTO", source: str = "s") -> tuple[Entry, str]:
    data = TEXTS[kind].encode()
    file = File(source, path, len(data), f"sha of {kind}", split, Place("p", 0))
    return pipeline.examine(file, data, Rules(), NOTHING)


def marked(files: list[tuple[Entry, str]], folder: Path, shard: int = 100, rules: Rules | None = None) -> list[Entry]:
    folder.mkdir()
    shards = []
    for begin in range(0, len(files), shard):
        some, texts = zip(*files[begin : begin + shard], strict=True)
        shards.append(folder / f"{begin}.parquet")
        shards[-1].write_bytes(examined.to_parquet(some, examined.signatures(some, texts), first=begin))
    entries = [entry for path in shards for entry in examined.from_parquet(path)]
    pipeline.mark_duplicates(entries, shards, rules or Rules())
    return entries


def test_what_is_a_duplicate_of_what(tmp_path: Path) -> None:
    files = [examine(f"{number}.py", kind) for number, kind in enumerate(TEXTS)] + [examine("again.py", "one")]
    found = {entry.file.path: entry for entry in marked(files, tmp_path / "a")}
    assert {path: entry.duplicate_of for path, entry in found.items()} == {
        "0.py": "", "1.py": "s:0.py", "2.py": "s:0.py", "3.py": "s:0.py",
        "4.py": "", "5.py": "", "6.py": "", "again.py": "s:0.py",
    }  # fmt: skip
    assert found["again.py"].findings[0].detail == "same bytes as 0.py of s"
    assert found["1.py"].findings[0].detail.startswith("same but for line ends and blanks")
    assert found["2.py"].findings[0].detail.startswith("near-duplicate (9")
    assert found["again.py"].similarity == found["1.py"].similarity == 1 > found["2.py"].similarity > 0.9
    assert found["6.py"].findings[0].reason is Reason.LOTS_OF_DIGITS


def test_near_duplicates_may_stay_but_on_one_side_of_the_split(tmp_path: Path) -> None:
    files = [examine("a.py", "one"), examine("b.py", "almost one"), examine("c.py", "one")]
    files += [examine("t.py", "one with a line less", "TEST")]
    entries = marked(files, tmp_path / "a", rules=Rules(near_duplicates=False))
    verdicts = pipeline.conclude(entries, Rules())
    assert [(verdict.reason, verdict.split) for verdict in verdicts] == [
        ("ACCEPTED", "TEST"),
        ("ACCEPTED", "TEST"),
        ("DUPLICATE", ""),
        ("ACCEPTED", "TEST"),
    ]
    assert marked(files, tmp_path / "b", rules=Rules(near_threshold=1.0))[1].is_clean


@pytest.mark.parametrize("near", [True, False])
def test_what_is_rejected_anyway_is_nobodys_survivor(tmp_path: Path, near: bool) -> None:
    excluded, text = examine("a.py", "one")
    excluded = replace(excluded, findings=(Finding(Reason.EXCLUDED_BY_MASK, "a.py"),))
    entries = marked([(excluded, text), examine("b.py", "almost one" if near else "one")], tmp_path / "a")
    assert entries[1].is_clean
    assert [finding.reason for finding in entries[0].findings][1:] == ([] if near else [Reason.DUPLICATE])


def test_a_scan_without_files_has_no_duplicates() -> None:
    pipeline.mark_duplicates([], [], Rules())


FILES = st.lists(
    st.builds(
        examine,
        st.text("abc", min_size=1, max_size=3),
        st.sampled_from(sorted(TEXTS)),
        st.sampled_from(["TEST", "AUTO"]),
        st.sampled_from(["s", "t"]),
    ),
    min_size=1,
    max_size=9,
    unique_by=lambda found: (found[0].file.source, found[0].file.path),
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(files=FILES, rng=st.randoms(use_true_random=False), shard=st.integers(1, 4))
def test_neither_order_nor_parts_matter(
    files: list[tuple[Entry, str]], rng: random.Random, shard: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("parts")

    def told(entries: list[Entry]) -> dict[tuple[str, str], tuple[object, ...]]:
        return {
            (entry.file.source, entry.file.path): (entry.findings, entry.duplicate_of, entry.similarity, entry.group)
            for entry in entries
        }

    first = marked(files, folder / "a")
    assert told(first) == told(marked(rng.sample(files, len(files)), folder / "b", shard))
    for entry in first:
        if entry.duplicate_of and entry.file.split == "TEST":
            source, _, path = entry.duplicate_of.partition(":")
            [kept] = [other for other in first if (other.file.source, other.file.path) == (source, path)]
            assert kept.is_clean and kept.file.split == "TEST"
