"""Guesses: found where the last tokens stood before, as many as are worth it, and never changing what comes out."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any, SupportsIndex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from services.core.models.spelling import Overhang
from services.inference.engine.blocks import BLOCK
from services.inference.engine.engine import Engine
from services.inference.engine.scheduler import Limits, Scheduler
from services.inference.engine.sequence import Reason, Result, Sampling
from services.inference.engine.speculate import Drafter, price, share
from tests.unit.inference.test_scheduler import compute, make
from tests.unit.inference.tiny import Bench, Heard, Knowing, greedy, marker

CHEAP = price(1)


def scanned(tokens: list[int], count: int) -> tuple[int, ...]:
    """The definition: behind the latest place where the last three tokens stood before, or else the last two."""
    for length in (3, 2):
        for end in range(len(tokens) - 1, length - 1, -1):
            if len(tokens) >= length and tokens[end - length : end] == tokens[-length:]:
                endless = tokens[end:] * count
                return tuple(endless[:count])
    return ()


@settings(max_examples=100)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 6))
def test_guesses_are_what_followed_the_last_time(tokens: list[int], most: int) -> None:
    drafter = Drafter()
    for size in range(1, len(tokens) + 1):
        drafter.learn(9, 9)
        assert drafter.draft(tokens[:size], most, 0.0) == scanned(tokens[:size], most)


class Counting(list[int]):
    """Counts what is looked at."""

    looked = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        self.looked += len(found) if isinstance(key, slice) else 1
        return found

    def __iter__(self) -> Any:
        raise AssertionError("all of them are looked at")

    def index(self, *_: SupportsIndex) -> Any:
        raise AssertionError("all of them are looked at")


def test_only_new_tokens_are_looked_at() -> None:
    tokens, drafter = Counting(random.Random(1).choices(range(50), k=8000)), Drafter()
    drafter.draft(tokens, 6, CHEAP)
    for _ in range(200):
        tokens.append(random.Random(2).randrange(50))
        tokens.looked = 0
        drafter.draft(tokens, 6, CHEAP)
        assert tokens.looked < 30


def test_who_guesses_wrong_stops_and_tries_again_now_and_then() -> None:
    drafter, tokens, sizes = Drafter(), [1, 2, 3] * 9, list[int]()
    for _ in range(200):
        sizes.append(len(drafter.draft(tokens, 6, price(4))))
        drafter.learn(sizes[-1], 0)
    assert sizes[0] > 0 and max(sizes[10:]) == 1 and 15 <= sum(sizes[10:]) <= 30
    for _ in range(100):
        drafter.learn(len(drafter.draft(tokens, 6, price(4))), 6)
    assert len(drafter.draft(tokens, 6, price(4))) == 6, "one that is right may guess more again"


def test_the_more_run_the_less_is_guessed() -> None:
    sizes = [len(Drafter().draft([1, 2] * 9, 8, price(tokens))) for tokens in (1, 2, 4, 8, 16, 64)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 and sizes[-1] == 0


def test_what_is_most_likely_to_be_right_is_guessed() -> None:
    likely, sizes = {3: 0.9, 5: 0.5, 8: 0.8}, {3: 4, 5: 2, 8: 3}  # 0.9 0.81 0.73 0.66, 0.5 0.25, 0.8 0.64 0.51
    assert share(likely, sizes, 4) == {3: 3, 8: 1}
    assert share(likely, sizes, 7) == {3: 4, 8: 3}
    assert share(likely, sizes, 8) == {3: 4, 8: 3, 5: 1}
    assert share(likely, sizes, 99) == sizes and share(likely, sizes, 0) == {}


@pytest.mark.parametrize(("count", "most"), [(1, 7), (4, 12), (8, 16)])
def test_a_step_has_so_many_guesses_and_no_more(count: int, most: int) -> None:
    scheduler = Scheduler(Limits())
    scheduler.submit(*(make(6, 40) for _ in range(count)))
    compute(scheduler, scheduler.plan(0))
    for sequence in scheduler.running:
        sequence.drafter.learn(99, 99)
    assert sum(len(work.drafts) for work in scheduler.plan(0).work) == most


def test_who_waits_for_the_first_token_waits_for_no_guesses() -> None:
    scheduler = Scheduler(Limits(step_tokens=8))
    first = make(6, 40)
    scheduler.submit(first)
    compute(scheduler, scheduler.plan(0))
    plan = scheduler.plan(0)
    assert [(work.count, len(work.drafts) > 2) for work in plan.work] == [(1, True)]
    compute(scheduler, plan, right=9)
    scheduler.submit(make(17, 1))
    for count in (7, 7, 3):
        plan = scheduler.plan(0)
        assert [(work.count, work.drafts) for work in plan.work] == [(1, ()), (count, ())], "not even in what is left"
        compute(scheduler, plan)
    assert scheduler.plan(0).work[0].drafts, "and now again"


def test_there_are_no_guesses_while_a_version_is_on_its_way(bench: Bench) -> None:
    engine = Engine(bench.runner, Limits())  # which is not started
    scheduler = engine._scheduler
    scheduler.submit(make(6, 40))
    compute(scheduler, scheduler.plan(0))
    with engine.calm():
        with engine.calm():
            assert not scheduler.plan(0).work[0].drafts
        assert not scheduler.plan(0).work[0].drafts, "another one still is"
    assert scheduler.plan(0).work[0].drafts


def test_guesses_take_no_block_that_others_may_need() -> None:
    scheduler = Scheduler(Limits(kv_tokens=3 * BLOCK))
    scheduler.submit(make(BLOCK - 3, 30), make(BLOCK - 3, 30))
    compute(scheduler, scheduler.plan(0))
    for room in (2, 1, 0):
        plan = scheduler.plan(0)
        assert [len(work.drafts) for work in plan.work] == [room, room] and scheduler.blocks.held == 2
        compute(scheduler, plan)


def test_who_leaves_while_guesses_are_checked_is_gone_with_the_step() -> None:
    scheduler = Scheduler(Limits(running=1))
    running, next_one = make(31, 40, session="s"), make(6, 40, session="t")
    scheduler.submit(running)
    compute(scheduler, scheduler.plan(0))
    scheduler.submit(next_one)
    plan = scheduler.plan(0)
    assert len(plan.work[0].drafts) > 1 and scheduler.blocks.held == 3
    running.cancelled = Reason.CANCELLED
    compute(scheduler, plan, right=9)
    plan = scheduler.plan(0)
    assert plan.ended == [(running, Reason.CANCELLED)] and plan.admitted == [next_one]
    assert scheduler.blocks.held == 1


@pytest.mark.parametrize("right", [0, 2, 9])
def test_no_more_is_guessed_than_may_come(right: int) -> None:
    for max_tokens in range(1, 9):
        scheduler, sequence = Scheduler(Limits()), make(6, max_tokens)
        scheduler.submit(sequence)
        while len(scheduler):
            plan = scheduler.plan(0)
            assert all(len(work.drafts) < max_tokens - sequence.generated for work in plan.work)
            compute(scheduler, plan, right)
        assert sequence.generated == max_tokens


def test_what_comes_behind_the_end_does_not_count(bench: Bench) -> None:
    vocabulary = bench.vocabulary
    ids = [vocabulary.index(character) for character in (b"a", b"b", b"\n", b"c", b"d")]
    heard = bench.make([1], 9, stop=("\n",), sampling=Sampling(logprobs=0))
    output = heard.sequence.take(Result(tuple(ids)))
    assert output and (output.text, output.reason, output.tokens) == ("ab", Reason.STOP, 3)
    assert heard.new == ids[:3]
    heard = bench.make([1], 2)
    output = heard.sequence.take(Result(tuple(ids)))
    assert output and (output.text, output.reason, heard.sequence.generated) == ("ab", Reason.LENGTH, 2)
    heard = bench.make([1], 9, stop_ids=frozenset({ids[3]}))
    output = heard.sequence.take(Result(tuple(ids)))
    assert output and (output.text, output.reason, heard.new) == ("ab\n", Reason.END_OF_TEXT, ids[:3])


PROMPTS = [random.Random(n).choices(range(256), k=size) for n, size in enumerate((9, 40))]
COOL = {"temperature": 0.7, "top_p": 0.95}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seed": {"sampling": Sampling(**COOL, seed=3)},
    "penalty": {"sampling": Sampling(repetition_penalty=1.5)},
    "penalty and seed": {"sampling": Sampling(**COOL, seed=4, repetition_penalty=1.2, min_p=0.01)},
    "logprobs": {"sampling": Sampling(logprobs=2)},
    "overhang": {"overhang": "\n  é"},
    "overhang, seed": {"overhang": "\n  é", "sampling": Sampling(**COOL, seed=5, repetition_penalty=1.2, logprobs=1)},
    "stop": {"stop": tuple("abcdefghij\n")},
    "line": {"single_line": True, "stop_ids": frozenset(range(60, 70))},
}


def told(heard: Heard, number: Callable[[float], Any] = float) -> Any:
    logprobs = [(item.token, number(item.logprob)) for output in heard.outputs for item in output.logprobs]
    tokens = sum(output.tokens for output in heard.outputs)
    return heard.text, heard.new, heard.reason, tokens, heard.sequence.generated, logprobs


def test_everything_is_as_without_guesses(reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    plain: list[Heard] = []
    for drafts in (0, 6):
        limits = Limits(running=5, step_tokens=40, kv_tokens=2048, draft_tokens=drafts)
        bench = Bench(reference, tokenizer, limits)
        adapters = [None, marker(bench.model, 1)]
        made = [
            bench.make(prompt, 25, adapter=adapter, **fields)
            for adapter in adapters
            for fields in KINDS.values()
            for prompt in PROMPTS
        ]
        for seed, (one, known) in enumerate(zip(made, plain, strict=False)):
            one.sequence.drafter = Knowing(known.sequence.tokens, seed)
            if left := one.sequence.text.overhang.left:  # right to its end, or not
                one.sequence.text.overhang = Overhang(left, (*known.new[: 3 + seed % 2], known.new[0]))
        bench.engine.submit(*(one.sequence for one in made))
        bench.engine.start()
        answers = [told(one.wait()) for one in made]
        right, drafted = bench.engine.drafted_tokens
        bench.engine.stop()
        assert bench.engine.blocks_held == 0
        if not drafts:
            plain = made
            assert drafted == 0 and answers[0][1] == greedy(reference, PROMPTS[0], 25)
            assert {one.reason for one in made} == {Reason.LENGTH, Reason.STOP, Reason.END_OF_TEXT}
    assert 100 < right < drafted
    assert answers == [told(one, partial(pytest.approx, abs=1e-4)) for one in plain]


def test_tokens_of_guesses_are_found_by_who_comes_next(bench: Bench, reference: LlamaForCausalLM) -> None:
    expected = [*PROMPTS[1], *greedy(reference, PROMPTS[1], 81)]
    first = bench.make(PROMPTS[1], 60)
    first.sequence.drafter = Knowing(expected, 1)
    bench.engine.submit(first.sequence)
    assert first.wait().sequence.tokens == expected[:100]
    assert bench.engine.drafted_tokens[0] > 10
    second = bench.submit(expected[:100], 20).wait()
    assert second.sequence.cached == 96 and second.new == expected[100:120]
