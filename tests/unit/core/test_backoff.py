from __future__ import annotations

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from services.core.backoff import Backoff


@given(st.integers(0, 10_000))
def test_waits_are_bounded_and_never_short(attempt: int) -> None:
    backoff = Backoff(timedelta(seconds=1), timedelta(seconds=8))
    whole = min(8.0, 2.0 ** min(attempt, 10))
    assert whole / 2 <= backoff.delay(attempt) <= whole


def test_waits_differ() -> None:
    assert len({Backoff().delay(3) for _ in range(20)}) > 10
