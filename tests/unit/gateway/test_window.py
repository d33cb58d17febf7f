"""Where long texts begin: at the same line for many positions of a sliding window. Short ones are never cut."""

from __future__ import annotations

import random
from itertools import pairwise

from services.gateway.api.window import LINES, SHARE, steady

DRAW = random.Random(0)
TEXT = [f"    {DRAW.choice(['return', 'x =', 'if', '}'])} {DRAW.randrange(50)}\n" for _ in range(1200)]


def test_short_texts_stay_whole() -> None:
    for text in ("", "x", "\n" * (LINES - 1), "".join(TEXT[: LINES - 1])):
        assert steady(text) == text


def test_what_is_left_is_the_texts_end_and_most_of_it() -> None:
    for count in (LINES, 200, 256, 1200):
        text = "".join(TEXT[:count])
        left = steady(text)
        assert text.endswith(left) and left.count("\n") >= count * (SHARE - 1) // SHARE


def test_a_sliding_window_begins_at_few_lines() -> None:
    begins = [at - steady("".join(TEXT[at - 256 : at])).count("\n") for at in range(256, 1200)]
    changes = sum(a != b for a, b in pairwise(begins))
    assert begins == sorted(begins), "never back"
    assert 0 < changes < len(begins) / 16, f"{changes} changes"


def test_lines_without_content_are_no_beginning() -> None:
    assert steady("\n" * 300) == "\n" * 300
    assert steady("\n" * 20 + "one\n" + "\n" * 300).startswith("one")
