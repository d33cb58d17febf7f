"""Who gets the next place: every project its share, nobody starves, no place stays free while somebody may run."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core import errors
from services.inference.assembly import limits
from services.inference.config import InferenceSettings
from services.inference.engine.scheduler import Limits, Scheduler
from services.inference.engine.sequence import Reason, Sequence
from tests.unit.inference.test_scheduler import compute, make


def of(project: str, tokens: int = 4, **fields: object) -> Sequence:
    return make(5, tokens, project=project, **fields)


def queued(scheduler: Scheduler, *sequences: Sequence) -> list[Sequence]:
    for sequence in sequences:
        scheduler.submit(sequence)
    return list(sequences)


def order(scheduler: Scheduler) -> list[str]:
    """Projects in the order in which their sequences get places, until all have ended."""
    admitted = list[str]()
    while len(scheduler):
        plan = scheduler.plan(0)
        admitted += [sequence.project for sequence in plan.admitted]
        compute(scheduler, plan)
    return admitted


def test_projects_take_turns() -> None:
    scheduler = Scheduler(Limits(running=1))
    queued(scheduler, *[of("a", 1) for _ in range(5)], *[of("b", 1) for _ in range(3)], of("c", 1))
    assert "".join(order(scheduler)) == "abcababaa"


def test_who_holds_many_places_lets_others_go_first() -> None:
    scheduler = Scheduler(Limits(running=4))
    queued(scheduler, *[of("a", 9) for _ in range(20)])
    assert len(scheduler.plan(0).admitted) == 4, "alone it may have all of them"
    running = list(scheduler.running)
    running[0].cancelled = Reason.CANCELLED
    queued(scheduler, *[of("b", 1) for _ in range(3)], of("c", 9))
    for project in "bcbb":  # the place that became free, and again whenever it does; but for one that c gets
        assert [sequence.project for sequence in scheduler.plan(0).admitted] == [project]
        if project == "c":
            running[1].cancelled = Reason.CANCELLED
        else:
            compute(scheduler, scheduler.plan(0))


def test_within_a_project_who_came_first_goes_first() -> None:
    scheduler = Scheduler(Limits(running=2))
    made = queued(scheduler, *[of(project, 1) for project in "abbaab"])
    admitted = list[Sequence]()
    while len(scheduler):
        plan = scheduler.plan(0)
        admitted += plan.admitted
        compute(scheduler, plan)
    for project in "ab":
        assert [s for s in admitted if s.project == project] == [s for s in made if s.project == project]


def test_a_project_has_limits_of_its_own() -> None:
    scheduler = Scheduler(Limits(running=4, waiting=9, project_running=2, project_waiting=3))
    queued(scheduler, *[of("a", 9) for _ in range(3)])
    assert len(scheduler.plan(0).admitted) == 2
    queued(scheduler, of("a"), of("a"))
    with pytest.raises(errors.QueueFull, match="of a wait"):
        scheduler.submit(of("a"))
    other = of("b")
    scheduler.submit(other)
    assert scheduler.plan(0).admitted == [other], "it waits for nobody"


def test_several_of_one_request_come_in_where_there_is_room_for_all() -> None:
    def several(project: str, count: int) -> list[Sequence]:
        first = of(project)
        return [first, *[of(project, after=first) for _ in range(count - 1)]]

    scheduler = Scheduler(Limits(running=1, waiting=6, project_waiting=4))
    scheduler.submit(*several("a", 3))
    with pytest.raises(errors.QueueFull, match="3 completions of a wait"):
        scheduler.submit(*several("a", 2))
    with pytest.raises(errors.QueueFull, match=r"^3 completions wait"):
        scheduler.submit(*several("b", 4))
    assert len(scheduler.waiting) == 3, "all or none"
    scheduler.submit(*several("a", 1))
    scheduler.submit(*several("b", 2))
    with pytest.raises(errors.QueueFull, match=r"^6 completions wait"):
        scheduler.submit(of("c"))


def test_more_of_one_request_than_may_wait_come_in_where_nobody_waits() -> None:
    scheduler = Scheduler(Limits(running=1, waiting=2, project_waiting=2))
    first = of("a")
    scheduler.submit(first, of("a", after=first), of("a", after=first))
    assert len(scheduler.waiting) == 3
    with pytest.raises(errors.QueueFull):
        scheduler.submit(of("b"))


def test_who_could_not_meet_its_deadline_is_told_at_once() -> None:
    scheduler = Scheduler(Limits(running=1))
    now = 0.0
    queued(scheduler, of("a", 10))
    while len(scheduler):
        compute(scheduler, scheduler.plan(now), now=(now := now + 0.1))
    queued(scheduler, *[of("a", 10) for _ in range(3)])
    scheduler.plan(now)
    for deadline, fits in ((8.4, False), (8.6, True)):  # 3 s times the caution, and its own second
        sequence = of("a", 10, deadline=now + deadline)
        sequence.submit_time = now
        if fits:
            scheduler.submit(sequence)
        else:
            with pytest.raises(errors.QueueFull) as refused:
                scheduler.submit(sequence)
            assert refused.value.retry_after == pytest.approx(3.0)


def test_a_group_that_waits_for_its_first_stands_in_nobodys_way() -> None:
    scheduler = Scheduler(Limits(running=4, step_tokens=8, draft_tokens=0))
    first = make(20, 9, project="a")
    scheduler.submit(first, make(20, 9, project="a", after=first))
    other = of("b")
    scheduler.submit(other)
    assert scheduler.plan(0).admitted == [first, other]


def test_a_newer_one_takes_the_place_of_its_sessions_older_group() -> None:
    scheduler = Scheduler(Limits(running=2, waiting=5))
    first = of("a", session="a/editor")
    group = [first, *[of("a", session="a/editor", after=first) for _ in range(3)]]
    scheduler.submit(*group)
    compute(scheduler, scheduler.plan(0))
    queued(scheduler, of("b"), of("c"))
    with pytest.raises(errors.QueueFull):
        scheduler.submit(of("b", session="b/editor"))
    newer = of("a", session="a/editor")
    scheduler.submit(newer)  # though the queue was full, for it leaves room
    assert {s.number: reason for s, reason in scheduler.plan(0).ended} == dict.fromkeys(
        [s.number for s in group], Reason.SUPERSEDED
    )
    assert len(scheduler.running) == 2


def test_who_is_refused_leaves_its_older_one_alone() -> None:
    scheduler = Scheduler(Limits(running=1, waiting=1))
    older = of("a", 9, session="a/editor")
    scheduler.submit(older)
    compute(scheduler, scheduler.plan(0))
    queued(scheduler, of("b"))
    with pytest.raises(errors.QueueFull):
        scheduler.submit(of("a", session="a/editor"))
    assert older.cancelled is None


@settings(max_examples=80, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 12), st.sampled_from("aaaabcd"), st.integers(1, 6), st.booleans()), max_size=40
    ),
    running=st.integers(1, 4),
    most=st.integers(1, 4),
)
def test_nobody_starves_and_no_place_is_wasted(
    arrivals: list[tuple[int, str, int, bool]], running: int, most: int
) -> None:
    scheduler = Scheduler(Limits(running=running, project_running=most, step_tokens=40))
    coming = sorted((step, project, tokens, cancel) for step, project, tokens, cancel in arrivals)
    for step in range(400):
        while coming and coming[0][0] <= step:
            _, project, tokens, cancel = coming.pop(0)
            sequence = of(project, tokens)
            scheduler.submit(sequence)
            sequence.cancelled = Reason.CANCELLED if cancel and step % 3 == 0 else None
        plan = scheduler.plan(0)
        held = {project: sum(s.project == project for s in scheduler.running) for project in "abcd"}
        assert len(scheduler.running) <= running and max(held.values()) <= most
        if len(scheduler.running) < running:
            assert all(held[s.project] == most for s in scheduler.waiting), "a place is free, and somebody may run"
        for new in plan.admitted:
            others = {other.project for other in scheduler.waiting}
            assert all(held[other] >= min(most, held[new.project] - 1) for other in others), "it was another's turn"
        compute(scheduler, plan)
        if not coming and not len(scheduler):
            break
    assert not len(scheduler), "everybody has had their turn"


def test_one_that_floods_delays_only_itself() -> None:
    scheduler = Scheduler(Limits(running=2, waiting=100))
    queued(scheduler, *[of("flood", 3) for _ in range(8)])
    for _ in range(50):
        compute(scheduler, scheduler.plan(0))
        if len(scheduler.waiting) < 50:
            queued(scheduler, of("flood", 3), of("flood", 3))
        single = of("single", 3)
        scheduler.submit(single)
        steps = 0
        while single.start_time is None:
            compute(scheduler, scheduler.plan(0))
            steps += 1
        assert steps <= 4, "it waits for a place that becomes free, and for nobody who waits"
        single.cancelled = Reason.CANCELLED


def test_the_settings_are_the_engines_limits() -> None:
    few = limits(
        InferenceSettings(inference_max_running=8, inference_project_waiting=5, inference_speculation_tokens=0)
    )
    assert (few.running, few.project_running, few.project_waiting, few.draft_tokens) == (8, 8, 5, 0)
    assert limits(InferenceSettings(inference_project_running=2)).project_running == 2
