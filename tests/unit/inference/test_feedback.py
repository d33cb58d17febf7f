"""Feedback is counted once, per version and hour, by any number of replicas."""

from __future__ import annotations

import asyncio
import time

import pytest

from codegraft.inference.v1 import feedback_pb2 as pb
from codegraft.inference.v1.feedback_pb2 import FeedbackHour
from services.core.errors import InvalidArgument, NotFound, ResourceExhausted
from services.core.state import MemoryState, Table
from services.inference import completion_id, feedback
from services.inference.completion_id import CompletionId
from services.inference.feedback import Feedback, wilson

P, SHA = "projects/p", "a" * 64
SHOWN, ACCEPTED = pb.FEEDBACK_EVENT_SHOWN, pb.FEEDBACK_EVENT_ACCEPTED
REJECTED, EDITED = pb.FEEDBACK_EVENT_REJECTED, pb.FEEDBACK_EVENT_EDITED


@pytest.fixture
def table() -> Table[FeedbackHour]:
    return Table(MemoryState(), FeedbackHour, missing=NotFound)


def made(sha256: str = SHA, ago: float = 0.0) -> CompletionId:
    return CompletionId(completion_id.complete(completion_id.draw(), sha256), time.time() - ago, sha256)


def test_an_id_says_when_and_by_whom() -> None:
    drawn = completion_id.draw()
    for sha256 in ("", SHA):
        known = completion_id.parse(completion_id.complete(drawn, sha256), now=time.time())
        assert known.adapter_sha256 == sha256 and abs(known.time - time.time()) < 5
    assert len({completion_id.draw() for _ in range(1000)}) == 1000


@pytest.mark.parametrize("text", ["", "cmpl-1", "z" * 32 + "-base", "0" * 32 + "-" + "a" * 63, "0" * 32 + "-base"])
def test_what_is_no_id_or_too_old_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        completion_id.parse(text, now=time.time())
    assert caught.value.field == "completion_id" and caught.value.hint


def test_an_id_of_the_future_is_refused() -> None:
    drawn = completion_id.complete(completion_id.draw(), "")
    completion_id.parse(drawn, now=time.time() - 30)
    with pytest.raises(InvalidArgument):
        completion_id.parse(drawn, now=time.time() - 3600)


async def test_events_count_once_and_stand_for_those_before_them(table: Table[FeedbackHour]) -> None:
    one, other = Feedback(table), Feedback(table)  # two replicas
    taken, passed, base = made(), made(), made("")
    assert await one.record(P, taken, SHOWN, 0)
    assert await one.record(P, taken, ACCEPTED, 12) == [ACCEPTED], "shown was told before"
    assert not await other.record(P, taken, ACCEPTED, 12)
    assert not await other.record(P, taken, SHOWN, 0)
    assert await other.record(P, passed, REJECTED, 0)
    assert await one.record(P, base, EDITED, 7)  # the first thing that is told about it
    assert not await one.record(P, base, ACCEPTED, 9)
    adapter, control = await other.acceptance(P, time.time() - 60)
    assert (adapter.adapter_sha256, adapter.shown, adapter.accepted, adapter.rejected) == (SHA, 2, 1, 1)
    assert (adapter.accepted_characters, adapter.edited, adapter.rate) == (12, 0, 0.5)
    assert adapter.rate_low < 0.5 < adapter.rate_high
    assert (control.adapter_sha256, control.shown, control.accepted, control.edited) == ("", 1, 1, 1)
    assert (control.edited_characters, control.accepted_characters) == (7, 0)
    assert await one.acceptance("projects/other", 0) == []


async def test_many_writers_lose_nothing(table: Table[FeedbackHour]) -> None:
    completions = [made() for _ in range(40)]
    replicas = [Feedback(table) for _ in range(3)]
    recorded = await asyncio.gather(*(r.record(P, c, SHOWN, 0) for c in completions for r in replicas))
    assert sum(map(len, recorded)) == len(completions)
    (entry,) = await replicas[0].acceptance(P, 0)
    assert entry.shown == len(completions)


async def test_the_window_is_of_when_completions_were_made_and_old_hours_go(table: Table[FeedbackHour]) -> None:
    counts = Feedback(table)
    old = FeedbackHour(name=f"{P}/feedback/{int(time.time() / 3600) - 91 * 24}-0")
    old.adapters.add(adapter_sha256=SHA, shown=1)
    await table.create(old)
    assert [entry.shown for entry in await counts.acceptance(P, 0)] == [1]
    await counts.record(P, made(ago=3 * 86400), SHOWN, 0)
    await counts.record(P, made(), SHOWN, 0)
    assert [entry.shown for entry in await counts.acceptance(P, time.time() - 86400)] == [1]
    assert [entry.shown for entry in await counts.acceptance(P, 0)] == [2], "older than any window: removed"


async def test_inventions_do_not_fill_the_store(table: Table[FeedbackHour], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "_MOST_VERSIONS", 2)
    monkeypatch.setattr(feedback, "_PARTS", 1)
    counts = Feedback(table)
    for digit in "ab":
        await counts.record(P, made(digit * 64), SHOWN, 0)
    with pytest.raises(ResourceExhausted):
        await counts.record(P, made("c" * 64), SHOWN, 0)
    monkeypatch.setattr(feedback, "_MOST_SEEN", 2)
    with pytest.raises(ResourceExhausted):
        await counts.record(P, made("a" * 64), SHOWN, 0)


@pytest.mark.parametrize(("event", "characters", "field"), [(0, 0, "event"), (9, 0, "event"), (2, -1, "characters")])
async def test_bad_feedback_names_its_field(
    table: Table[FeedbackHour], event: int, characters: int, field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await Feedback(table).record(P, made(), event, characters)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_the_interval_is_wilsons() -> None:
    assert wilson(10, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)  # R: prop.test(10, 20, correct = FALSE)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert 0.999999 < wilson(10, 10)[1] <= 1.0
