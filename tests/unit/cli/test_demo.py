"""What the demo measures: places, scores, and what the streams saw of a swap."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cli.demo import editor, places
from services.cli.demo.editor import Stream
from services.cli.demo.material import HELD_OUT, find_package
from services.cli.demo.places import Place

TEXT = "".join(f"first_{number} = compute({number})\n" for number in range(40))


@given(st.text(max_size=20), st.text(max_size=20))
def test_edit_similarity_is_symmetric_and_1_only_for_equals(left: str, right: str) -> None:
    found = places.edit_similarity(left, right)
    assert found == places.edit_similarity(right, left)
    assert 0 <= found <= 1 and (found == 1) == (left == right)


@pytest.mark.parametrize(
    ("got", "expected", "wanted"), [("abc", "abd", 2 / 3), ("", "ab", 0), ("kitten", "sitting", 4 / 7)]
)
def test_edit_similarity_counts_edits(got: str, expected: str, wanted: float) -> None:
    assert places.edit_similarity(got, expected) == pytest.approx(wanted)


def test_places_are_whole_lines_of_code_and_the_same_every_time() -> None:
    chosen = places.choose([("a.py", TEXT)], 10)
    assert chosen == places.choose([("a.py", TEXT)], 10)
    for place in chosen:
        assert place.prefix + place.expected + "\n" + place.suffix in TEXT + "\n"
    assert places.choose([("a.py", "# only\n" * 50)], 10) == []


def test_score_looks_at_the_first_line() -> None:
    wanted = [Place("a", "", "", "x = 1"), Place("a", "", "", "y = 2")]
    found = places.score(["x = 1\nmore", "y = 3"], wanted)
    assert (found.exact_match, found.edit_similarity) == (0.5, pytest.approx(0.9))


def test_looking_back_at_a_swap() -> None:
    streams = [
        Stream("", 0.0, 0.5, 1.0, whole=True),
        Stream("", 1.0, 1.5, 3.0, whole=True),
        Stream("new", 3.0, 3.25, 4.0, whole=True),
        Stream("new", 4.0, 0.0, 4.5, whole=False),
    ]
    swap = editor.look_back(streams, "new", published=2.0, served=2.25)
    assert swap == editor.Swap(streams=4, broken=1, over_the_swap=1, first_token_seconds=1.25)


def test_the_package_is_packed_with_its_held_out_file(tmp_path: Path) -> None:
    package = find_package()
    package.pack(tmp_path / "p.tar.gz")
    with tarfile.open(tmp_path / "p.tar.gz") as archive:
        packed = set(archive.getnames())
    assert f"minio/{HELD_OUT}" in packed and "minio/api.py" in packed
    assert package.text(HELD_OUT) == package.text(f"minio/{HELD_OUT}")
