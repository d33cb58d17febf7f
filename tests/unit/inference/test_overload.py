"""Four times of what can be done: as much is done as ever, the rest is refused at once, and nothing piles up.

On a clock of the test's own, with steps of a constant time; the real engine beside it for what depends on threads.
"""

from __future__ import annotations

import heapq
import random
import threading
import time
from dataclasses import dataclass, field
from statistics import median

import pytest

from services.core import errors
from services.inference.engine.engine import Engine
from services.inference.engine.scheduler import Limits, Scheduler, Work
from services.inference.engine.sequence import Output, Reason, Result, Sequence
from services.inference.engine.text import TextStream
from tests.unit.inference.test_scheduler import compute, make

STEP, TOKENS, PLACES = 0.02, 10, 8
CAPACITY = PLACES / (TOKENS * STEP)
"""Completions a second."""


@dataclass
class World:
    """Clients that come at random times, and come back when they are told to."""

    offered: float
    """Completions a second, as a multiple of the capacity."""
    deadline: float
    """Seconds that each completion has."""
    seconds: float = 15.0
    slower: float = 1.0
    """How many times as long the steps of every other two seconds take."""
    scheduler: Scheduler = field(
        default_factory=lambda: Scheduler(Limits(running=PLACES, waiting=32, project_waiting=24, draft_tokens=0))
    )
    steps: int = 0
    whole: int = 0
    """Completions that came whole, before their deadline."""
    partial: int = 0
    refusals: list[float] = field(default_factory=list)
    """What the refused were told to wait."""
    waited: list[float] = field(default_factory=list)
    """Seconds in the queue of those that came whole."""
    most_waiting: int = 0

    def run(self) -> World:
        rng, now, comes = random.Random(1), 0.0, list[tuple[float, int]]()
        at = 0.0
        while at < self.seconds:
            at += rng.expovariate(self.offered * CAPACITY)
            comes.append((at, 0))
        heapq.heapify(comes)
        while now < self.seconds:
            while comes and comes[0][0] <= now:
                _, attempt = heapq.heappop(comes)
                sequence = make(5, TOKENS, deadline=now + self.deadline, project=str(rng.randrange(3)))
                sequence.submit_time = now
                try:
                    self.scheduler.submit(sequence)
                except errors.QueueFull as error:
                    assert error.retry_after is not None
                    self.refusals.append(error.retry_after)
                    if attempt < 3:
                        heapq.heappush(comes, (now + error.retry_after + rng.random() * 0.2, attempt + 1))
            self.most_waiting = max(self.most_waiting, len(self.scheduler.waiting))
            plan = self.scheduler.plan(now)
            now += STEP * (self.slower if int(now / 2) % 2 else 1.0)
            self.steps += 1
            self.partial += sum(reason is Reason.DEADLINE for _, reason in plan.ended)
            for sequence in compute(self.scheduler, plan, now=now):
                self.whole += 1
                self.waited.append((sequence.start_time or 0.0) - sequence.submit_time)
        return self

    @property
    def goodput(self) -> float:
        """Of the capacity."""
        return self.whole * TOKENS / (self.steps * PLACES)


@pytest.mark.parametrize("deadline", [0.5, 5.0])
def test_at_four_times_the_capacity_as_much_is_done_as_ever(deadline: float) -> None:
    peak = max(World(offered, deadline).run().goodput for offered in (1.0, 1.2))
    overloaded = World(4.0, deadline).run()
    assert peak > 0.85 and overloaded.goodput >= 0.9 * peak
    assert overloaded.partial < 0.1 * overloaded.whole, "who is let in mostly gets a whole completion"
    assert overloaded.most_waiting <= 32


@pytest.mark.parametrize("deadline", [0.5, 2.0])
def test_a_machine_that_is_slower_at_times_does_hardly_anything_in_vain(deadline: float) -> None:
    unsteady = World(4.0, deadline, seconds=40.0, slower=1.5).run()
    assert unsteady.goodput >= 0.95 and unsteady.partial < 0.05 * unsteady.whole


def test_the_refused_are_told_about_when_there_is_room() -> None:
    world = World(4.0, 5.0).run()
    assert 0.5 * median(world.waited) < median(world.refusals) < 2 * median(world.waited)
    assert World(0.6, 5.0).run().refusals == []


class Steady:
    """Steps that take a constant time."""

    def begin(self) -> None:
        pass

    def step(self, work: list[Work]) -> list[Result | None]:
        time.sleep(0.002)
        return [Result((0,)) if item.samples else None for item in work]

    def release(self, sequence: Sequence) -> None:
        pass


def test_refusals_do_not_wait_for_the_engine() -> None:
    engine = Engine(Steady(), Limits(running=4, waiting=8))
    engine.start()
    ended, slowest, refused = list[Output](), list[float](), list[float]()
    until = time.monotonic() + 20

    def client() -> None:
        mine = 0.0
        while (len(ended) <= 40 or len(refused) <= 200) and time.monotonic() < until:
            done = threading.Event()

            def deliver(output: Output, done: threading.Event = done) -> None:
                if output.reason is not None:
                    ended.append(output)
                    done.set()

            sequence = Sequence(prompt=[0] * 5, max_tokens=10, text=TextStream([b"x"]), deliver=deliver)
            begin = time.monotonic()
            try:
                engine.submit(sequence)
            except errors.QueueFull as error:
                mine = max(mine, time.monotonic() - begin)
                refused.append(error.retry_after or 0.0)
                time.sleep(0.01)
            else:
                assert done.wait(20)
        slowest.append(mine)

    threads = [threading.Thread(target=client) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.stop()
    assert len(ended) > 20 and len(refused) > 100
    assert median(slowest) < 0.05 and median(refused) < 0.5
    assert engine.load == (0, 0) and engine.blocks_held == 0
