"""Held-out places: which lines are chosen, and how what was written is scored."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core import places
from services.core.places import Place, Score

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


@pytest.mark.parametrize("text", [TEXT, TEXT.replace("first", "    first").replace("\n", "\r\n"), TEXT.rstrip("\n")])
def test_places_are_whole_lines_of_code_with_what_stands_around_them(text: str) -> None:
    chosen = places.choose([("a.py", text)], 10)
    assert len(chosen) == len(set(chosen)) == 10
    for place in chosen:
        assert (place.prefix + place.expected + place.suffix) in text
        assert place.prefix.count("\n") >= 10 and place.expected.startswith("first_")
        assert place.suffix[:1] in ("", "\n") or place.suffix.startswith("\r\n")


@pytest.mark.parametrize("line", ["# only = (1)", "  // f(x);", "it is prose, no code", "x = 1", "y = " + "1" * 90, ""])
def test_lines_not_worth_completing_are_left_out(line: str) -> None:
    assert places.choose([("a.py", f"{line}\n" * 50)], 10) == []


def test_the_choice_depends_on_seed_and_texts_alone() -> None:
    files = [("a.py", TEXT), ("b.py", TEXT.replace("first", "second"))]
    chosen = places.choose(files, 10)
    assert places.choose(files[::-1], 10) == chosen
    assert [place.expected for place in places.choose([("moved.py", text) for _, text in files], 10)] == [
        place.expected for place in chosen
    ]
    assert places.choose(files, 10, seed=1) != chosen
    assert places.choose(files, 6) == chosen[:6], "a larger budget adds places, and moves none"


def test_a_long_file_counts_no_more_than_a_short_one() -> None:
    files = [("long.py", TEXT * 20), ("short.py", TEXT[:300].replace("first", "short"))]
    chosen = places.choose(files, 4)
    assert [place.path for place in chosen].count("short.py") == 2


def test_the_score_looks_at_the_first_line() -> None:
    wanted = [Place("a", "", "", "x = 1"), Place("a", "", "", "y = 2")]
    found = Score.of(places.similarities(["  x = 1\nmore", "y = 3"], wanted))
    assert (found.exact_match, found.edit_similarity) == (0.5, pytest.approx(0.9))
