"""Texts of completions: kept beside each other, read by time, deleted; a store that fails costs nobody his feedback."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from codegraft.inference.v1 import feedback_pb2 as pb
from codegraft.inference.v1.feedback_pb2 import KeptCompletion
from services.core.audit import record as audit
from services.core.errors import InvalidArgument, NotFound, StateUnavailable
from services.core.state import MemoryState, Table
from services.inference import completion_id, kept
from services.inference.completion_id import CompletionId
from services.inference.kept import Kept

P, SHA = "projects/p", "a" * 64
SHOWN, ACCEPTED = pb.FEEDBACK_EVENT_SHOWN, pb.FEEDBACK_EVENT_ACCEPTED
REJECTED, EDITED = pb.FEEDBACK_EVENT_REJECTED, pb.FEEDBACK_EVENT_EDITED


def made() -> CompletionId:
    return completion_id.parse(completion_id.complete(completion_id.draw(), SHA), now=time.time())


@pytest.fixture
def texts() -> Kept:
    return Kept(Table(MemoryState(), KeptCompletion, missing=NotFound))


async def test_a_completions_texts_lie_beside_each_other(texts: Kept) -> None:
    first = made()
    await asyncio.sleep(0.002)  # ids are in order by the millisecond
    second = made()
    for event, text in ((SHOWN, "retürn x + y"), (ACCEPTED, "retürn x"), (EDITED, "return z")):
        assert await texts.keep(P, first, event, text)
    assert await texts.keep(P, second, REJECTED, "pass")
    (one, other), token = await texts.page(P, 0, 0, "")
    assert (one.shown.decode(), one.accepted.decode(), one.edited.decode()) == ("retürn x + y", "retürn x", "return z")
    assert (one.event, one.adapter_sha256, one.name) == (EDITED, SHA, f"{P}/completions/{first.text}")
    assert (other.shown, other.accepted, other.event, token) == (b"pass", b"", REJECTED, "")
    assert abs(one.create_time.ToNanoseconds() / 1e9 - first.time) < 0.001


async def test_they_are_read_by_project_page_and_time(texts: Kept) -> None:
    for number in range(3):
        await texts.keep(P, made(), SHOWN, str(number))
        await asyncio.sleep(0.002)
    await texts.keep("projects/p2", made(), SHOWN, "of another")
    first, token = await texts.page(P, 0, 2, "")
    rest, end = await texts.page(P, 0, 2, token)
    assert [each.shown for each in (*first, *rest)] == [b"0", b"1", b"2"] and not end
    since = first[1].create_time.ToNanoseconds() / 1e9
    assert [each.shown for each in (await texts.page(P, since, 0, ""))[0]] == [b"1", b"2"], "a project of today"


async def test_they_are_deleted_and_no_audit_record_holds_them(texts: Kept) -> None:
    await texts.keep(P, made(), SHOWN, "secret code")
    await texts.keep("projects/p2", made(), SHOWN, "of another")
    with audit.gathering() as gathered:
        assert await texts.delete(P) == 1
    assert gathered.changes and "secret" not in str(audit.fill(audit.AuditRecord(), gathered.changes))
    assert await texts.page(P, 0, 0, "") == ([], "")
    assert len((await texts.page("projects/p2", 0, 0, ""))[0]) == 1


async def test_a_store_that_fails_costs_the_text_only(capsys: pytest.CaptureFixture[str]) -> None:
    class Down(MemoryState):
        async def create(self, key: str, value: bytes) -> Any:
            raise StateUnavailable("the bucket is full")

    texts = Kept(Table(Down(), KeptCompletion, missing=NotFound))
    assert not await texts.keep(P, made(), SHOWN, "secret code")
    assert "secret" not in "".join(capsys.readouterr())


def test_long_texts_are_refused_without_being_repeated() -> None:
    kept.check("x" * kept.MOST_CHARACTERS)
    with pytest.raises(InvalidArgument) as refused:
        kept.check("secret" * 4000)
    assert refused.value.field == "text" and "secretsecret" not in refused.value.message
