"""The arithmetic of rates: never more than the limit a minute, never less than is there, and what is settled later."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.errors import QuotaExceeded
from services.core.quota import rates
from services.core.quota.bucket import MINUTE, Bucket
from services.core.quota.limits import UNLIMITED, Defaults, Kind, effective, message_of, of_message
from services.core.quota.rates import Rates

GAPS = st.lists(st.floats(min_value=0, max_value=30), min_size=1, max_size=150)
LIMITS = st.integers(min_value=1, max_value=1000)


class Clock:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def rate(limits: dict[str, int | None], clock: Clock) -> Rates:
    return Rates(Kind.TOKENS, lambda kind, owner: limits.get(owner), clock)


def passes(rate: Rates, owner: str = "keys/k", amount: int = 1) -> bool:
    try:
        rate.take([owner], amount)
    except QuotaExceeded:
        return False
    return True


@given(GAPS, LIMITS, st.integers(min_value=1, max_value=50))
def test_in_no_time_more_passes_than_a_full_bucket_and_what_came_in(gaps: list[float], limit: int, most: int) -> None:
    """However calls come: between any two moments at most limit + limit * minutes, as the definition of GCRA has it."""
    bucket, now = Bucket(), 0.0
    passed: list[tuple[float, int]] = []
    for number, gap in enumerate(gaps):
        now += gap
        amount = min(1 + number % most, limit)
        if bucket.wait(amount, limit, now) == 0:
            bucket.take(amount, limit, now)
            passed.append((now, amount))
    for first in range(len(passed)):
        total = 0
        for at, amount in passed[first:]:
            total += amount
            assert total <= limit * (1 + (at - passed[first][0]) / MINUTE) + 1e-6 * limit * len(gaps)


@given(GAPS, LIMITS)
def test_who_waits_as_long_as_told_gets_in_and_not_sooner(gaps: list[float], limit: int) -> None:
    bucket, now = Bucket(), 0.0
    for number, gap in enumerate(gaps):
        now += gap
        amount = 1 + number % (2 * limit)
        if wait := bucket.wait(amount, limit, now):
            assert bucket.wait(amount, limit, now + wait * 0.99 - 1e-3) > 0
            now += wait
        assert bucket.wait(amount, limit, now) == 0
        bucket.take(amount, limit, now)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(0, 800)), min_size=1, max_size=40))
def test_what_is_settled_is_what_was_used(calls: list[tuple[int, int]]) -> None:
    """Let in with what they may take, calls pay what they took, more or less, and so do those that never began."""
    clock = Clock()
    tokens = rate({"keys/k": 10_000_000}, clock)
    charges = [(tokens.take(["keys/k"], most), took) for most, took in calls]
    for charge, took in charges:
        charge.settle(took)
        charge.settle(12345)  # only the first time counts
    assert tokens.used("keys/k") == pytest.approx(sum(took for _, took in calls), abs=2)


def test_a_minutes_worth_may_come_at_once_and_comes_back_evenly() -> None:
    clock = Clock()
    tokens = rate({"keys/k": 60}, clock)
    assert sum(passes(tokens) for _ in range(100)) == 60
    clock.now += 10
    assert sum(passes(tokens) for _ in range(100)) == 10
    clock.now += 3600
    assert sum(passes(tokens) for _ in range(100)) == 60


def test_a_refusal_says_whose_which_how_much_and_when() -> None:
    clock = Clock()
    tokens = rate({"projects/p": 60, "keys/k": 1000}, clock)
    tokens.take(["projects/p", "keys/k"], 50)
    with pytest.raises(QuotaExceeded) as refused:
        tokens.take(["projects/p", "keys/k"], 30)
    error = refused.value
    assert error.metadata == {"quota": "tokens_per_minute", "owner": "projects/p", "limit": "60", "used": "50"}
    assert error.retry_after == pytest.approx(20) and "projects/p may have 60 tokens a minute" in error.message
    assert tokens.used("keys/k") == 50, "what one refuses, the other does not pay"
    clock.now += 20.001
    tokens.take(["projects/p", "keys/k"], 30)


def test_more_than_the_limit_waits_for_a_full_bucket_and_leaves_a_debt() -> None:
    clock = Clock()
    tokens = rate({"keys/k": 60}, clock)
    assert passes(tokens, amount=180) and not passes(tokens)
    clock.now += 120
    assert not passes(tokens), "the debt is of three minutes, of which one was there"
    clock.now += 2
    assert passes(tokens)


def test_nothing_is_let_through_with_zero_and_everything_without_a_limit() -> None:
    tokens = rate({"keys/k": 0}, Clock())
    with pytest.raises(QuotaExceeded) as refused:
        tokens.take(["keys/k"], 1)
    assert refused.value.retry_after == MINUTE
    assert all(passes(tokens, "keys/free", 10**9) for _ in range(3)) and tokens.used("keys/free") is None


def test_a_limit_counts_from_its_change_on() -> None:
    limits: dict[str, int | None] = {"keys/k": 10}
    tokens = rate(limits, Clock())
    assert passes(tokens, amount=10) and not passes(tokens)
    limits["keys/k"] = None
    assert passes(tokens, amount=100)
    limits["keys/k"] = 10
    assert not passes(tokens)


def test_invented_names_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "MOST_BUCKETS", 50)
    clock = Clock()
    tokens = Rates(Kind.TOKENS, lambda kind, owner: 60, clock)
    for number in range(500):
        clock.now += 1.5
        tokens.take([f"projects/p{number}"], 1)
    assert len(tokens._buckets) <= 51


@given(st.dictionaries(st.sampled_from(list(Kind)), st.integers(-1, 10**12)), st.integers(0, 10**12))
def test_what_counts_is_what_was_set_else_the_default(limits: dict[Kind, int], default: int) -> None:
    assert of_message(message_of(dict(limits))) == limits
    found = effective(limits, Defaults(tokens_per_minute=default))
    for kind in Kind:
        own = limits.get(kind)
        default_of = default if kind is Kind.TOKENS else None
        assert found[kind] == (default_of if own is None else None if own == UNLIMITED else own)
