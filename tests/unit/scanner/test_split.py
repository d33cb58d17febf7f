"""The split into train and test: nothing leaks, and hardly anything moves."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from services.scanner import split
from services.scanner.split import Item

ITEMS = st.lists(
    st.builds(
        Item,
        st.sampled_from([f"g{number}" for number in range(30)]),
        st.sampled_from(["TRAIN", "TEST", "AUTO"]),
        st.sampled_from("ab"),
    ),
    min_size=1,
    max_size=60,
)


@given(ITEMS, st.integers(0, 5), st.sampled_from([None, 0.0, 0.1, 0.3]))
def test_no_group_is_divided(items: list[Item], seed: int, share: float | None) -> None:
    parts = split.assign(items, seed=seed, share=share)
    for group in {item.group for item in items}:
        assert len({part for part, item in zip(parts, items, strict=True) if item.group == group}) == 1


@given(ITEMS)
def test_what_is_marked_stays_where_it_is_marked(items: list[Item]) -> None:
    parts = dict(zip([item.group for item in items], split.assign(items, share=0.3), strict=True))
    for item in items:
        if item.asked == "TEST":
            assert parts[item.group] == "TEST"


@given(ITEMS, st.randoms(use_true_random=False))
def test_order_does_not_matter(items: list[Item], rng: random.Random) -> None:
    before = dict(zip([item.group for item in items], split.assign(items), strict=True))
    shuffled = rng.sample(items, len(items))
    assert dict(zip([item.group for item in shuffled], split.assign(shuffled), strict=True)) == before


def test_a_marked_file_makes_the_test_set_unless_a_share_is_asked_for() -> None:
    items = [Item(f"g{number}", "AUTO") for number in range(200)] + [Item("marked", "TEST")]
    assert split.assign(items).count("TEST") == 1
    assert split.assign(items, share=0.2).count("TEST") > 20
    assert 20 <= split.assign(items[:-1]).count("TEST") <= 40


def test_files_that_come_later_move_no_other() -> None:
    few = [Item(f"g{number}", "AUTO") for number in range(1000)]
    many = [*few, *(Item(f"new{number}", "AUTO") for number in range(1000))]
    assert split.assign(many)[:1000] == split.assign(few)


def test_every_kind_has_its_share() -> None:
    kinds = {"py": 1000, "go": 400, "rare": 30, "alone": 5}
    items = [
        Item(f"{kind}{n}", "AUTO", split.stratum(kind, "s", "src/x"))
        for kind, many in kinds.items()
        for n in range(many)
    ]
    parts = split.assign(items)
    share = {
        kind: sum(part == "TEST" and item.group.startswith(kind) for item, part in zip(items, parts, strict=True))
        / many
        for kind, many in kinds.items()
    }
    assert 0.03 < share["py"] < 0.08 and 0.02 < share["go"] < 0.09 and 0 < share["rare"] < 0.2
    for seed in range(20):
        parts = split.assign(items, seed=seed)
        assert any(part == "TEST" and item.group.startswith("rare") for item, part in zip(items, parts, strict=True))


def test_a_stratum_is_language_source_and_top_folder() -> None:
    assert split.stratum("Go", "s", "cmd/a/b.go") == split.stratum("Go", "s", "cmd/c.go")
    others = [("Python", "s", "cmd/a"), ("Go", "t", "cmd/a"), ("Go", "s", "pkg/a"), ("Go", "s", "cmd")]
    assert len({split.stratum("Go", "s", "cmd/a"), *(split.stratum(*other) for other in others)}) == 5


def test_another_seed_gives_another_test_set() -> None:
    items = [Item(f"g{number}", "AUTO") for number in range(400)]
    assert split.assign(items, seed=1) != split.assign(items, seed=2)
