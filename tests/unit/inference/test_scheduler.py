"""The scheduler's steps: decodes first, prompts in chunks, everybody in the order of arrival, nobody twice."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core import errors
from services.inference.engine.blocks import BLOCK
from services.inference.engine.scheduler import Limits, Plan, Scheduler
from services.inference.engine.sequence import Reason, Result, Sequence
from services.inference.engine.text import TextStream

VOCABULARY = [b"x"]


def make(prompt: int = 5, max_tokens: int = 4, **fields: Any) -> Sequence:
    text = TextStream(VOCABULARY)
    return Sequence(prompt=[0] * prompt, max_tokens=max_tokens, text=text, deliver=lambda _: None, **fields)


def compute(scheduler: Scheduler, plan: Plan, right: int = 0, now: float = 0.0) -> list[Sequence]:
    """Pretends to run the step until now, with so many guesses right; the sequences that ended with it."""
    ended = []
    results = [Result((0,) * (1 + min(right, len(work.drafts)))) if work.samples else None for work in plan.work]
    for work, result in zip(plan.work, results, strict=True):
        output = work.sequence.take(result) if result else None
        if output and output.reason:
            ended.append(work.sequence)
    scheduler.commit(plan.work, results)
    scheduler.remove(ended, now)
    return ended


def test_a_long_prompt_goes_in_chunks_beside_decodes() -> None:
    scheduler = Scheduler(Limits(step_tokens=8, draft_tokens=0))
    short, long = make(3, 9), make(20)
    scheduler.submit(short)
    compute(scheduler, scheduler.plan(0))
    scheduler.submit(long)
    steps = []
    for _ in range(4):
        plan = scheduler.plan(0)
        steps.append([(work.sequence is short, work.count, work.samples) for work in plan.work])
        compute(scheduler, plan)
    assert steps[:2] == [[(True, 1, True), (False, 7, False)]] * 2
    assert steps[2:] == [[(True, 1, True), (False, 6, True)], [(True, 1, True), (False, 1, True)]]


def test_blocks_are_given_out_in_order_of_arrival() -> None:
    scheduler = Scheduler(Limits(kv_tokens=3 * BLOCK))
    first, large, small = make(2 * BLOCK, 5), make(2 * BLOCK, 5), make(1, 1)
    for sequence in (first, large, small):
        scheduler.submit(sequence)
    assert scheduler.plan(0).admitted == [first]
    scheduler.remove([first], 0)
    assert scheduler.plan(0).admitted == [large]
    scheduler.remove([large], 0)
    assert scheduler.plan(0).admitted == [small]


def test_the_latest_gives_up_its_blocks_and_comes_back_first() -> None:
    scheduler = Scheduler(Limits(kv_tokens=4 * BLOCK, step_tokens=64))
    first, second, third = make(BLOCK, 2 * BLOCK), make(BLOCK, 2 * BLOCK), make(1, 1)
    for sequence in (first, second, third):
        scheduler.submit(sequence)
    assert scheduler.plan(0).admitted == [first, second]
    while scheduler.preemptions == 0:
        compute(scheduler, scheduler.plan(0))
    assert scheduler.running == [first] and list(scheduler.waiting) == [second, third]
    tokens = len(second.tokens)
    assert tokens > BLOCK and second.table is None and second.computed == 0
    while first in scheduler.running:
        assert not scheduler.plan(0).admitted
        compute(scheduler, scheduler.plan(0))
    plan = scheduler.plan(0)
    assert second in scheduler.running and second not in plan.admitted, "it is not told again that it begins"
    assert plan.work[0].sequence is second and plan.work[0].start >= BLOCK, "what was still there is not computed again"
    while len(scheduler):
        compute(scheduler, scheduler.plan(0))
    assert all(s.generated == s.max_tokens for s in (first, second, third)) and scheduler.blocks.held == 0


def test_a_known_beginning_is_not_computed_again() -> None:
    scheduler = Scheduler(Limits())
    for prompt, cached in ((40, 0), (40, 32), (33, 32), (32, 16), (90, 32), (90, 80)):
        sequence = make(prompt, 1)
        scheduler.submit(sequence)
        plan = scheduler.plan(0)
        assert (plan.work[0].start, plan.work[0].count, sequence.cached) == (cached, prompt - cached, cached)
        compute(scheduler, plan)
    assert (scheduler.cached_tokens, scheduler.prompt_tokens) == (192, 325)


def test_a_project_finds_nothing_of_another_one_in_the_cache() -> None:
    scheduler = Scheduler(Limits())
    found = []
    for project in ("projects/a", "projects/b", "projects/a", "projects/b", ""):
        sequence = make(40, 1, project=project)
        scheduler.submit(sequence)
        compute(scheduler, scheduler.plan(0))
        found.append(sequence.cached)
    assert found == [0, 0, 32, 32, 0]


def test_only_what_was_computed_is_found() -> None:
    scheduler = Scheduler(Limits(step_tokens=20))
    first = make(64, 1)
    scheduler.submit(first)
    compute(scheduler, scheduler.plan(0))
    first.cancelled = Reason.CANCELLED
    second = make(64, 1)
    scheduler.submit(second)
    scheduler.plan(0)
    assert second.cached == BLOCK


def test_what_could_never_run_is_refused_at_once() -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        Scheduler(Limits(kv_tokens=40)).submit(make(20, 20))
    assert refused.value.field == "stop.max_tokens"


def test_the_queue_is_bounded_and_cancelled_ones_do_not_count() -> None:
    scheduler = Scheduler(Limits(running=1, waiting=2))
    waiting = [make(), make()]
    for sequence in waiting:
        scheduler.submit(sequence)
    with pytest.raises(errors.QueueFull):
        scheduler.submit(make())
    waiting[0].cancelled = Reason.CANCELLED
    scheduler.submit(make())
    assert scheduler.plan(0).ended == [(waiting[0], Reason.CANCELLED)]


def test_deadlines_end_waiting_and_running_ones() -> None:
    scheduler = Scheduler(Limits(running=1))
    running, waiting, patient = make(deadline=1.0), make(deadline=1.0), make(deadline=9.0)
    for sequence in (running, waiting, patient):
        scheduler.submit(sequence)
    compute(scheduler, scheduler.plan(0.5))
    plan = scheduler.plan(1.0)
    assert plan.ended == [(waiting, Reason.DEADLINE), (running, Reason.DEADLINE)]
    assert plan.admitted == [patient]


def test_a_session_has_one_sequence() -> None:
    scheduler = Scheduler(Limits())
    older, other, newer = make(session="a"), make(session="b"), make(session="a")
    for sequence in (older, other, newer):
        scheduler.submit(sequence)
    plan = scheduler.plan(0)
    assert plan.ended == [(older, Reason.SUPERSEDED)] and plan.admitted == [other, newer]


@settings(max_examples=60)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 10), st.booleans()), min_size=1, max_size=20),
    running=st.integers(1, 5),
    step_tokens=st.integers(8, 20),
)
def test_everybody_ends_within_the_limits(shapes: list[tuple[int, int, bool]], running: int, step_tokens: int) -> None:
    limits = Limits(running=running, step_tokens=step_tokens, kv_tokens=5 * BLOCK)
    scheduler = Scheduler(limits)
    sequences = [make(prompt, tokens) for prompt, tokens, _ in shapes]
    for sequence, (_, _, cancel) in zip(sequences, shapes, strict=True):
        scheduler.submit(sequence)
        if cancel:
            sequence.cancelled = Reason.CANCELLED
    ended: list[Sequence] = []
    for _ in range(2000):
        if not len(scheduler):
            break
        plan = scheduler.plan(0)
        ended += [sequence for sequence, _ in plan.ended]
        assert len(plan.work) <= running and sum(len(work.tokens) for work in plan.work) <= step_tokens
        assert all(len(s.tokens) <= BLOCK * len(s.table.blocks) for s in scheduler.running if s.table)
        assert all(work.start == work.sequence.computed for work in plan.work)
        decoding = {s.number for s in scheduler.running if s.remaining == 1}
        assert decoding <= {work.sequence.number for work in plan.work}, "decodes never wait for prompts"
        ended += compute(scheduler, plan)
    assert len(ended) == len({s.number for s in ended}) == len(sequences) and not len(scheduler)
    assert all(s.generated == s.max_tokens for s in sequences if s.cancelled is None)
    assert scheduler.blocks.held == 0
