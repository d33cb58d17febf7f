"""Rates over several processes: what passes in all, who knows what when, and what is left of those that went away."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from codegraft.access.v1.quota_pb2 import SharedAmount, SharedUsage
from services.core.quota import exchange
from services.core.quota.bucket import MINUTE, Bucket
from services.core.quota.channel import MemoryChannel, Wire
from services.core.quota.exchange import Exchange
from services.core.quota.limits import Kind
from services.core.quota.rates import MUCH, Rates
from services.core.telemetry import figures
from tests.unit.core.test_quota_rates import Clock, passes, rate

LIMITS = st.integers(min_value=20, max_value=2000)
REPLICAS = st.integers(min_value=2, max_value=4)


class Replica:
    """One process, whose messages a test carries."""

    def __init__(self, clock: Clock, limits: dict[str, int | None]) -> None:
        self.tokens = rate(limits, clock)
        self.exchange = Exchange(MemoryChannel(Wire()), {Kind.TOKENS: self.tokens})
        self.eager = False

        def hurry() -> None:
            self.eager = True

        self.tokens.hurry = hurry

    def speak(self, others: Sequence[Replica]) -> None:
        self.eager = False
        for word in self.exchange.words():
            for each in others:
                each.exchange.hear(word)

    def left(self, owner: str = "keys/k") -> float:
        return self.tokens.left().get(owner, 0.0)


def replicas(count: int, clock: Clock, limit: int | None) -> list[Replica]:
    return [Replica(clock, {"keys/k": limit}) for _ in range(count)]


def exchanged(those: Sequence[Replica]) -> None:
    for each in those:
        each.speak(those)


@settings(max_examples=60)
@given(
    REPLICAS,
    LIMITS,
    st.lists(st.floats(min_value=0.02, max_value=1.0), min_size=1, max_size=80),
    st.integers(1, 30),
    st.integers(1, 4),
)
def test_in_no_time_more_passes_at_all_than_the_limit_and_what_is_not_told_yet(
    count: int, limit: int, gaps: list[float], amount: int, calls: int
) -> None:
    """As for one process, but for what each of the others may have let in since it last spoke."""
    clock = Clock()
    those = replicas(count, clock, limit)
    due, passed = clock.now, []
    for gap in gaps:
        clock.now += gap
        total = 0
        for each in those:
            total += sum(amount for _ in range(calls) if passes(each.tokens, amount=amount))
        passed.append((clock.now, total))
        for each in those:
            if each.eager or clock.now >= due:
                each.speak(those)
        if clock.now >= due:
            due = clock.now + exchange.INTERVAL
    untold = (count - 1) * (limit * MUCH + calls * amount)
    for first in range(len(passed)):
        total = 0
        for at, each_time in passed[first:]:
            total += each_time
            room = max(limit, amount) * (1 + (at - passed[first][0]) / MINUTE)
            assert total <= room + untold + 1e-6 * limit * len(gaps)


@settings(max_examples=60)
@given(REPLICAS, LIMITS, st.lists(st.tuples(st.integers(0, 3), st.floats(0, 20), st.integers(1, 500)), max_size=40))
def test_all_know_of_all_as_one_bucket_would(count: int, limit: int, calls: list[tuple[int, float, int]]) -> None:
    """Later by the time that a word takes, and by no more: what was told late comes back late."""
    clock = Clock()
    those, one, delay = replicas(count, clock, limit), Bucket(), 0.2
    for who, gap, drawn in calls:
        amount = 1 + drawn % limit  # all of them together are less than an hour, of which others are believed
        clock.now += gap
        those[who % count].tokens.correct(["keys/k"], amount)
        one.take(amount, limit, clock.now)
        clock.now += delay
        exchanged(those)
    for each in those:
        assert -1e-6 <= each.left() - one.left(clock.now) <= delay + 1e-6


def test_what_comes_back_comes_back_to_all() -> None:
    clock = Clock()
    here, there = replicas(2, clock, 1000)
    charge = here.tokens.take(["keys/k"], 900)
    exchanged([here, there])
    assert there.tokens.used("keys/k") == 900 and not passes(there.tokens, amount=200)
    charge.settle(100)
    exchanged([here, there])
    assert there.tokens.used("keys/k") == 100 and passes(there.tokens, amount=200)
    assert there.exchange.words() and not there.exchange.words(), "what was told is not told again"


@given(LIMITS, st.integers(1, 1000), st.floats(0, 200))
def test_a_process_that_dies_leaves_nothing_for_ever(limit: int, amount: int, pause: float) -> None:
    clock, amount = Clock(), 1 + amount % (3 * limit)
    here, there = replicas(2, clock, limit)
    here.tokens.correct(["keys/k"], amount)
    exchanged([here, there])
    clock.now += pause
    assert there.left() == pytest.approx(max(0.0, amount * MINUTE / limit - pause), abs=1e-6)


@given(REPLICAS, LIMITS, st.integers(1, 2000))
def test_who_begins_knows_what_the_others_know(count: int, limit: int, amount: int) -> None:
    clock, amount = Clock(), 1 + amount % (10 * limit)
    those = replicas(count, clock, limit)
    those[0].tokens.correct(["keys/k"], amount)
    exchanged(those)
    clock.now += 5
    newcomer = Replica(clock, {"keys/k": limit})
    newcomer.exchange._anew()
    everybody = [*those, newcomer]
    newcomer.speak(everybody)
    exchanged(everybody)
    assert newcomer.left() == pytest.approx(those[0].left())
    exchanged(everybody)
    assert [each.left() for each in everybody] == pytest.approx([those[0].left()] * (count + 1)), "twice is once"


def test_who_was_cut_off_counts_alone_and_afterwards_the_fullest_does_not_count() -> None:
    clock = Clock()
    here, there = replicas(2, clock, 60)
    for each, amount in ((here, 60), (there, 20)):
        assert passes(each.tokens, amount=amount)
        each.tokens.untold()  # cut off, it speaks to nobody
    assert not passes(here.tokens) and passes(there.tokens), "its own bucket is not empty"
    there.tokens.untold()
    for each in (here, there):
        each.exchange._anew()
    exchanged([here, there])
    exchanged([here, there])
    assert here.tokens.used("keys/k") == there.tokens.used("keys/k") == 60, "no debt of others, and no fresh start"


def test_owners_without_a_limit_here_and_changed_limits() -> None:
    clock = Clock()
    limits: dict[str, int | None] = {"keys/k": 60}
    here, there = Replica(clock, {"keys/k": 60}), Replica(clock, limits)
    limits["keys/k"] = None
    here.tokens.take(["keys/k"], 30)
    exchanged([here, there])
    assert there.tokens.left() == {} and there.tokens.used("keys/k") is None
    limits["keys/k"] = 120
    here.tokens.take(["keys/k"], 30)
    exchanged([here, there])
    assert there.tokens.used("keys/k") == 30


@given(st.floats(), st.integers(-(2**63), 2**63 - 1), st.sampled_from([*Kind, "", "beds"]))
def test_nobody_is_shut_out_for_longer_than_an_hour_by_what_others_say(left: float, taken: int, quota: str) -> None:
    here = Replica(Clock(), {"keys/k": 60})
    amounts = [SharedAmount(owner="keys/k", quota=quota, taken=taken, left_seconds=left)] * 3
    here.exchange.hear(SharedUsage(process="x", amounts=amounts).SerializeToString())
    assert 0 <= here.left() <= 3600 and not math.isnan(here.tokens.used("keys/k") or 0)


def test_what_cannot_be_read_is_passed_by() -> None:
    here = Replica(Clock(), {"keys/k": 60})
    with capture_logs() as logs:
        here.exchange.hear(b"\xff\xff\xff")
    assert len(logs) == 1 and here.left() == 0


def test_many_owners_go_in_several_messages() -> None:
    clock = Clock()
    here, there = (Rates(Kind.TOKENS, lambda kind, owner: 60, clock) for _ in range(2))
    talks, listens = (Exchange(MemoryChannel(Wire()), {Kind.TOKENS: each}) for each in (here, there))
    here.hurry = lambda: None
    names = [f"projects/{'p' * 50}-{number}" for number in range(5000)]
    for name in names:
        here.take([name], 7)
    talks._anew()
    words = talks.words()
    assert max(map(len, words)) < 300_000
    assert [SharedUsage.FromString(word).asks for word in words] == [True] + [False] * (len(words) - 1)
    for word in words:
        listens.hear(word)
    assert all(there.used(name) == 7 for name in names)


# --- the loop -----------------------------------------------------------------------------------------------------


class Ear(MemoryChannel):
    """Counts what is sent by it."""

    def __init__(self, wire: Wire, *, deaf: bool = False) -> None:
        super().__init__(wire)
        self.sent, self._deaf = 0, deaf

    async def send(self, message: bytes) -> None:
        self.sent += 1
        if not self._deaf:
            await super().send(message)


class Running:
    """A process whose exchange runs."""

    def __init__(self, wire: Wire, limit: int = 60, *, deaf: bool = False) -> None:
        self.tokens = Rates(Kind.TOKENS, lambda kind, owner: limit)
        self.channel = Ear(wire, deaf=deaf)
        self.task = asyncio.create_task(Exchange(self.channel, {Kind.TOKENS: self.tokens}).run())

    async def until_used(self, least: int, owner: str = "keys/k") -> None:
        async with asyncio.timeout(10):
            while (self.tokens.used(owner) or 0) < least:  # noqa: ASYNC110  # as a caller sees it
                await asyncio.sleep(0.002)

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        assert self.task.cancelled(), "it ends when it is told to"


async def test_nothing_is_sent_while_nothing_is_taken_and_much_at_once() -> None:
    wire = Wire()
    here, there = Running(wire), Running(wire)
    await asyncio.sleep(0.4)
    assert here.channel.sent <= 2, "it asks, and answers who asks"

    async def seconds(amount: int, enough: int) -> float:
        """Until the other one has heard of it; the best of some, as the machine may stand still meanwhile."""
        took = []
        for number in range(4):
            owner, began, quiet = f"keys/{amount}-{number}", time.monotonic(), here.channel.sent
            here.tokens.take([owner], amount)
            await there.until_used(enough, owner)
            took.append(time.monotonic() - began)
            assert here.channel.sent - quiet <= 2
        return min(took)

    assert await seconds(3, 1) <= exchange.INTERVAL + 0.2
    assert await seconds(40, 30) < 0.15, "half of the limit does not wait for the next time"
    await here.stop()
    await there.stop()
    assert here.tokens.hurry is None


async def test_cut_off_and_back_by_itself() -> None:
    wire = Wire()
    here, there = Running(wire), Running(wire)
    await asyncio.sleep(0.05)
    here.channel.cut()
    quiet = here.channel.sent
    here.tokens.take(["keys/k"], 30)
    await asyncio.sleep(0.3)
    assert there.tokens.used("keys/k") == 0 and here.channel.sent == quiet, "nothing is kept for later"
    there.tokens.take(["keys/k"], 10)
    here.channel.mend()
    await there.until_used(20)
    late = Running(wire)
    await late.until_used(15)
    for each in (here, there, late):
        await each.stop()


async def test_who_hears_nothing_of_itself_says_so_once_and_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("INTERVAL", 0.002), ("_SOONEST", 0.001), ("_UNHEARD", 5), ("_SILENT", 1.0)):
        monkeypatch.setattr(exchange, name, value)
    with capture_logs() as logs:
        mute = Running(Wire(), 10**6, deaf=True)
        for _ in range(40):
            mute.tokens.take(["keys/k"], 1)
            await asyncio.sleep(0.003)
        assert mute.channel.sent == 6 and [entry["log_level"] for entry in logs] == ["error"]
        async with asyncio.timeout(10):
            while mute.channel.sent == 6:  # noqa: ASYNC110  # it asks again after a while
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert mute.channel.sent == 7
        await mute.stop()


async def test_what_is_exchanged_is_counted_and_so_is_who_counts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("INTERVAL", 0.005), ("_SOONEST", 0.001), ("_RECENT", 0.2), ("_SILENT", 0.05)):
        monkeypatch.setattr(exchange, name, value)
    wire, clock = Wire(), Clock()
    channels = [MemoryChannel(wire), MemoryChannel(wire)]
    here, there = (rate({"keys/k": 1000}, clock) for _ in channels)
    running = [
        asyncio.create_task(Exchange(channel, {Kind.TOKENS: rates}).run())
        for channel, rates in zip(channels, (here, there), strict=True)
    ]

    async def until(true: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not true():
                here.take(["keys/k"])
                await asyncio.sleep(0.002)

    sent, received = (figures.QUOTA_MESSAGES.labels(each)._value for each in ("sent", "received"))
    began = sent.get(), received.get()
    await until(lambda: received.get() > began[1] and sent.get() > began[0])
    assert abs(figures.QUOTA_HEARD._value.get() - time.time()) < 5
    await until(lambda: (figures.QUOTA_PEERS._value.get(), figures.QUOTA_ALONE._value.get()) == (1, 0))
    cut, unheard = (figures.QUOTA_FALLBACKS.labels(each)._value for each in ("DISCONNECTED", "UNHEARD"))
    before = cut.get(), unheard.get()
    channels[0].cut()
    await until(lambda: cut.get() == before[0] + 1)
    channels[0].mend()
    await until(lambda: figures.QUOTA_ALONE._value.get() == 0)
    running[1].cancel()
    await asyncio.gather(running[1], return_exceptions=True)
    await until(lambda: figures.QUOTA_PEERS._value.get() == 0)
    channels[0]._hear = None  # a user that may speak and is not heard
    await until(lambda: unheard.get() == before[1] + 1)
    assert figures.QUOTA_ALONE._value.get() == 1
    running[0].cancel()
    await asyncio.gather(running[0], return_exceptions=True)
    assert cut.get() == before[0] + 1, "each time counts once"
    figures.QUOTA_ALONE.set(0)
