"""How many threads a step gets."""

from __future__ import annotations

import random

from services.inference.engine.pace import Pace


def run(pace: Pace, steps: int, times: dict[int, float], noise: float = 0.0) -> list[int]:
    """The threads of so many steps, of which each takes what its number of threads takes just now."""
    rng, chosen = random.Random(1), list[int]()
    for _ in range(steps):
        tokens = rng.choice((1, 4, 12, 30))
        chosen.append(pace.threads(tokens))
        seconds = times[chosen[-1]] * (8 + tokens) * rng.uniform(1 - noise, 1 + noise)
        pace.took(chosen[-1], tokens, seconds)
    return chosen


def test_all_are_used_while_they_are_quicker_and_half_of_them_is_tried_now_and_then() -> None:
    chosen = run(Pace(8), 400, {8: 0.002, 4: 0.003})
    assert chosen[:2] == [8, 8] and 4 <= chosen.count(4) <= 20


def test_it_follows_what_others_do_within_a_few_steps_and_back_within_a_few_seconds_of_steps() -> None:
    pace = Pace(2)
    run(pace, 100, {2: 0.002, 1: 0.003})
    beside = run(pace, 600, {2: 0.015, 1: 0.003})  # another process computes
    assert set(beside[8:30]) == {1}
    assert beside[30:].count(2) <= 4, "what is five times slower is hardly ever tried"
    alone = run(pace, 600, {2: 0.002, 1: 0.003})
    assert alone[520:].count(2) > 70


def test_neither_code_that_is_compiled_nor_a_prompt_decides() -> None:
    pace, times = Pace(2), {2: 0.002, 1: 0.003}
    pace.took(2, 1, 0.5)  # the first step of all
    assert set(run(pace, 30, times)[3:]) == {2}
    for _ in range(5):
        pace.took(2, 256, 10.0)
    assert pace.threads(4) == 2


def test_a_prompt_is_never_what_is_tried_on() -> None:
    pace, tried = Pace(2), 0
    for _ in range(400):
        assert pace.threads(256) == 2
        threads = pace.threads(4)
        tried += threads == 1
        pace.took(threads, 4, {2: 0.02, 1: 0.03}[threads])
    assert tried > 4


def test_who_computes_beside_the_steps_has_half_of_the_cores_at_once_and_teaches_nothing() -> None:
    pace, times = Pace(2), {2: 0.002, 1: 0.003}
    run(pace, 10, times)
    assert pace.crowded() == 0
    with pace.beside():
        assert pace.crowded() == 1, "what is left to the step in progress"
        with pace.beside():
            assert run(pace, 100, {2: 0.02, 1: 0.02}) == 100 * [1]
        pace.took(2, 4, 10.0)  # a step that had begun before
        assert pace.threads(4) == pace.threads(256) == 1
    assert set(run(pace, 10, times)) == {2} and pace.crowded() == 0


def test_trying_costs_little_and_noise_does_not_make_it_waver() -> None:
    times = {2: 0.002, 1: 0.0026}
    chosen = run(Pace(2), 2000, times, noise=0.15)
    assert sum(times[threads] for threads in chosen) < 1.03 * 2000 * times[2]


def test_calls_that_are_answered_beside_some_steps_do_not_make_it_waver() -> None:
    rng, pace, chosen = random.Random(1), Pace(2), list[int]()
    calls = 0
    for _ in range(4000):
        calls = calls - 1 if calls else rng.randint(1, 6) * (rng.random() < 0.1)
        threads = pace.threads(16)
        chosen.append(threads)
        seconds = {2: 0.071 if calls else 0.049, 1: 0.077 if calls else 0.067}[threads]
        pace.took(threads, 16, seconds * rng.uniform(0.9, 1.1))
    assert chosen.count(1) < 0.1 * len(chosen)
