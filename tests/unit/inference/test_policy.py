"""What a policy resolves to is decided from its record alone, and a split by the session alone."""

from __future__ import annotations

import asyncio
import random

import pytest

from codegraft.inference.v1.serving_pb2 import (
    SERVING_MODE_LATEST_BEST,
    SERVING_MODE_OFF,
    SERVING_MODE_PINNED,
    Serving,
    Split,
)
from services.core.errors import FailedPrecondition, ServingNotFound
from services.core.state import MemoryState, Table
from services.inference.adapters.route import Route, Version, share
from services.inference.policy import (
    BASE,
    HISTORY,
    Best,
    Choice,
    Policies,
    approve,
    called,
    follow_best,
    named,
    set_mode,
)

SERVED = "projects/p/runs/a/checkpoints/10"


def best(run: str, step: int, loss: float | None, test_set: str = "t") -> Best:
    return Best(f"projects/p/runs/{run}/checkpoints/{step}", f"{run}{step}", "m", "d", loss, test_set)


def serving(*bests: Best) -> Serving:
    made = Serving(name="projects/p/serving", mode=SERVING_MODE_LATEST_BEST)
    for one in (best("a", 10, 2.0), *bests):
        follow_best(made, one)
    return made


@pytest.mark.parametrize(
    ("new", "wanted", "waiting"),
    [
        (best("b", 5, 1.9), "b5", ""),
        (best("b", 5, 2.0), "b5", ""),
        (best("b", 5, 2.1), "a10", "b5"),
        (best("b", 5, 2.1, "another test set"), "b5", ""),
        (best("b", 5, 2.1, ""), "b5", ""),
        (best("b", 5, None), "b5", ""),
        (best("a", 20, 1.9), "a20", ""),
        (best("a", 5, 2.1), "a10", ""),  # of the same run, and late
        (best("a", 10, 2.0), "a10", ""),
    ],
)
def test_a_best_that_is_worse_on_the_same_test_set_waits(new: Best, wanted: str, waiting: str) -> None:
    made = serving(new)
    assert (made.wanted_sha256, made.waiting_sha256) == (wanted, waiting)
    assert bool(waiting) == made.HasField("waiting_test_loss") == bool(made.waiting_checkpoint)


def test_what_waits_is_overtaken() -> None:
    assert serving(best("b", 5, 2.2), best("b", 9, 2.1)).waiting_sha256 == "b9"
    assert serving(best("b", 9, 2.1), best("b", 5, 2.2)).waiting_sha256 == "b9", "came late"
    assert serving(best("b", 9, 2.1), best("c", 5, 2.3)).waiting_sha256 == "c5", "the latest run's"
    better = serving(best("b", 5, 2.2), best("b", 9, 1.8))
    assert (better.wanted_sha256, better.waiting_sha256) == ("b9", "")
    assert not better.HasField("waiting_test_loss")


def test_a_word_by_a_person_lets_it_serve() -> None:
    made = serving(best("b", 5, 2.2))
    name = made.waiting_checkpoint
    for other in (SERVED.replace("10", "11"), "projects/p/runs/b/checkpoints/9"):
        with pytest.raises(FailedPrecondition, match=name) as caught:
            approve(made, other)
        assert caught.value.field == "checkpoint" and caught.value.hint
    approve(made, name)
    assert (made.wanted_sha256, made.wanted_test_loss, made.wanted_test_set) == ("b5", 2.2, "t")
    assert made.waiting_checkpoint == "" and not made.HasField("waiting_test_loss")
    after = Serving.FromString(made.SerializeToString())
    approve(after, name)
    assert after == made, "a repeated call changes nothing"
    with pytest.raises(FailedPrecondition, match="nothing else does"):
        approve(made, SERVED)


def test_modes() -> None:
    def chosen(
        start: Serving, mode: int, pinned: Choice = BASE, found: Best | Choice | None = None
    ) -> tuple[str, str, str]:
        set_mode(start, mode, pinned, found, None)  # type: ignore[arg-type]
        return start.wanted_sha256, start.waiting_sha256, start.pinned_checkpoint

    waiting = best("b", 5, 2.2)
    pin = Choice(SERVED, "a10", 2.0, "t")
    assert chosen(serving(waiting), SERVING_MODE_OFF) == ("", "", "")
    assert chosen(serving(waiting), SERVING_MODE_PINNED, pin) == ("a10", "", SERVED)
    assert chosen(serving(), SERVING_MODE_LATEST_BEST, found=waiting) == ("a10", "b5", ""), "no change of the mode"
    pinned = serving()
    chosen(pinned, SERVING_MODE_PINNED, pin)
    assert chosen(pinned, SERVING_MODE_LATEST_BEST, found=waiting) == ("b5", "", ""), "a person asked for the best"
    chosen(pinned, SERVING_MODE_PINNED, pin)
    assert chosen(pinned, SERVING_MODE_LATEST_BEST) == ("a10", "", ""), "the best is not known: no other answer"
    follow_best(pinned, best("a", 5, 2.5))
    assert pinned.wanted_sha256 == "a5", "a person asked for it, so it need not be better"
    chosen(pinned, SERVING_MODE_PINNED, pin)
    assert chosen(pinned, SERVING_MODE_LATEST_BEST, found=BASE) == ("", "", ""), "there is none"
    off = Serving(mode=SERVING_MODE_OFF)
    assert chosen(off, SERVING_MODE_LATEST_BEST) == ("", "", "")
    split = Split(checkpoint=SERVED, percent=10, sha256="a10")
    set_mode(off, SERVING_MODE_OFF, BASE, None, split)
    assert off.split == split and off.wanted_sha256 == ""
    set_mode(off, SERVING_MODE_OFF, BASE, None, None)
    assert not off.HasField("split")


def test_the_way_back_is_remembered() -> None:
    made = serving()
    assert made.previous_checkpoint == ""
    follow_best(made, best("a", 20, 1.9))
    assert made.previous_checkpoint == SERVED and named(made) == {SERVED, made.wanted_checkpoint}
    set_mode(made, SERVING_MODE_OFF, BASE, None, None)
    assert made.previous_checkpoint.endswith("/20"), "from the base model, too"
    follow_best(made, best("a", 30, 1.8))
    assert made.previous_checkpoint.endswith("/20")
    set_mode(made, SERVING_MODE_PINNED, Choice(SERVED, "x"), None, Split(checkpoint="s", percent=5))
    assert named(made) == {SERVED, "s", made.previous_checkpoint}, "nothing lies between"


def test_what_it_came_to_from_when_on_is_remembered() -> None:
    made = Serving(mode=SERVING_MODE_LATEST_BEST)
    for step in (10, 20, 20):  # the trainer tells of the same best again
        follow_best(made, best("a", step, 2.0 - step / 100))
    set_mode(made, SERVING_MODE_OFF, BASE, None, None)
    told = [(each.sha256, each.mode, each.HasField("test_loss")) for each in made.history]
    assert told == [
        ("", SERVING_MODE_OFF, False),
        ("a20", SERVING_MODE_LATEST_BEST, True),
        ("a10", SERVING_MODE_LATEST_BEST, True),
    ]
    times = [each.time.ToNanoseconds() for each in made.history]
    assert times == sorted(times, reverse=True) and times[-1] > 0
    for step in range(2 * HISTORY):
        set_mode(made, SERVING_MODE_PINNED, Choice(SERVED, f"s{step}"), None, None)
    assert len(made.history) == HISTORY and made.history[0].sha256 == made.wanted_sha256


def test_a_version_is_called_as_the_policy_calls_it_now() -> None:
    made = serving(best("b", 5, 1.9))
    assert (called(made, "b5"), called(made, "a10")) == (made.wanted_checkpoint, SERVED), "and as it was called then"
    assert called(made, "c1") == ""
    twin = "projects/p/runs/c/checkpoints/1"
    set_mode(made, SERVING_MODE_PINNED, Choice(twin, "b5"), None, Split(checkpoint=SERVED, sha256="a10", percent=5))
    assert (called(made, "b5"), called(made, "a10"), made.history[0].checkpoint) == (twin, SERVED, twin)


async def test_replicas_that_hear_of_bests_in_any_order_agree() -> None:
    """All write into one record; who was first never decides which of a run's bests is wanted or waits."""
    for seed in range(20):
        bests = [best("b", step, 2.3 - step / 100) for step in (1, 2, 3)] + [best("a", 20, 1.9)]
        table = Table(MemoryState(), Serving, missing=ServingNotFound)
        await Policies(table).change("projects/p", lambda s: follow_best(s, best("a", 10, 2.0)))
        orders = [random.Random(seed * 10 + replica).sample(bests, len(bests)) for replica in range(3)]

        async def hear(order: list[Best], table: Table[Serving] = table) -> None:
            for one in order:
                await Policies(table).change("projects/p", lambda s, one=one: follow_best(s, one))  # type: ignore[misc]
                await asyncio.sleep(0)

        await asyncio.gather(*(hear(order) for order in orders))
        found = await Policies(table).get("projects/p")
        assert found.wanted_sha256 == "a20", seed
        await hear([best("b", 3, 2.27)])  # as the trainer answers every replica's next question
        found = await Policies(table).get("projects/p")
        assert (found.wanted_sha256, found.waiting_sha256) == ("a20", "b3"), seed


def test_a_session_stays_on_its_side_and_the_sides_have_their_sizes() -> None:
    main, second = Version("a", SERVED, 4, 1), Version("b", SERVED, 4, 1)
    route = Route(main, second, 25)
    keys = [f"session-{n}" for n in range(4000)]
    sides = [route.choose("projects/p", key) for key in keys]
    assert 0.22 < sides.count(second) / len(keys) < 0.28
    assert sides == [Route(main, second, 25).choose("projects/p", key) for key in keys]
    more = [Route(main, second, 60).choose("projects/p", key) for key in keys]
    assert all(later is second for before, later in zip(sides, more, strict=True) if before is second)
    assert [share("projects/p", key) for key in ("", "s-1", "s-2")] == [35, 63, 32], "the same in every release"
    other = [route.choose("projects/q", key) for key in keys]
    assert 0.55 < sum(x is y for x, y in zip(sides, other, strict=True)) / len(keys) < 0.7, "projects differ"
    assert {Route(main).choose("projects/p", key) for key in keys} == {main}
    assert Route(main, second, 0).versions() == {"a"} and route.versions() == {"a", "b"}
