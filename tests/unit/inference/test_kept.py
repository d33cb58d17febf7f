"""Texts of completions: kept beside each other where a project wants that, read, and let go when it does not any more.
A store that fails costs nobody his feedback."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import Any

import pytest

from codegraft.event.v1.events_pb2 import ProjectChanged
from codegraft.inference.v1 import feedback_pb2 as pb
from codegraft.inference.v1.feedback_pb2 import KeptCompletion
from services.core.audit import record as audit
from services.core.backoff import Backoff
from services.core.errors import InvalidArgument, NotFound, StateUnavailable, Unavailable
from services.core.events import MemoryBus
from services.core.state import MemoryState, Table
from services.inference import completion_id, forgetting, kept
from services.inference.completion_id import CompletionId
from services.inference.forgetting import Forgetting
from services.inference.kept import Kept

P, OTHER, SHA = "projects/p", "projects/p2", "a" * 64
SHOWN, ACCEPTED = pb.FEEDBACK_EVENT_SHOWN, pb.FEEDBACK_EVENT_ACCEPTED
REJECTED, EDITED = pb.FEEDBACK_EVENT_REJECTED, pb.FEEDBACK_EVENT_EDITED


def made() -> CompletionId:
    return completion_id.parse(completion_id.complete(completion_id.draw(), SHA), now=time.time())


class Projects:
    """Since when each keeps texts, as ingest says; nothing of it while it is away."""

    def __init__(self) -> None:
        self.since: dict[str, float] = {P: 0.0, OTHER: 0.0}
        self.away = 0
        """Questions that get no answer."""

    async def exists(self, project: str) -> bool:
        return True

    def forget(self, project: str) -> None:
        pass

    async def kept_since(self, project: str) -> float | None:
        if self.away:
            self.away -= 1
            raise Unavailable("no ingest")
        return self.since.get(project)


@pytest.fixture
def projects() -> Projects:
    return Projects()


@pytest.fixture
def texts(projects: Projects) -> Kept:
    return Kept(Table(MemoryState(), KeptCompletion, missing=NotFound), projects)


async def of(texts: Kept, project: str) -> list[bytes]:
    """All that is stored of a project, whoever may see it."""
    return [each.shown for each in await texts._table.all(f"{project}/")]


async def test_a_completions_texts_lie_beside_each_other(texts: Kept) -> None:
    first = made()
    await asyncio.sleep(0.002)  # ids are in order by the millisecond
    second = made()
    for event, text in ((SHOWN, "retürn x + y"), (ACCEPTED, "retürn x"), (EDITED, "return z")):
        assert await texts.keep(P, first, event, text)
    assert await texts.keep(P, second, REJECTED, "pass")
    (one, other), token = await texts.page(P, 0, "")
    assert (one.shown.decode(), one.accepted.decode(), one.edited.decode()) == ("retürn x + y", "retürn x", "return z")
    assert (one.event, one.adapter_sha256, one.name) == (EDITED, SHA, f"{P}/completions/{first.text}")
    assert (other.shown, other.accepted, other.event, token) == (b"pass", b"", REJECTED, "")
    assert abs(one.create_time.ToNanoseconds() / 1e9 - first.time) < 0.001


async def test_they_are_read_by_project_page_and_time(texts: Kept, projects: Projects) -> None:
    for number in range(3):
        await texts.keep(P, made(), SHOWN, str(number))
        await asyncio.sleep(0.002)
    await texts.keep(OTHER, made(), SHOWN, "of another")
    first, token = await texts.page(P, 2, "")
    rest, end = await texts.page(P, 2, token)
    assert [each.shown for each in (*first, *rest)] == [b"0", b"1", b"2"] and not end
    projects.since[P] = first[1].create_time.ToNanoseconds() / 1e9
    assert [each.shown for each in (await texts.page(P, 0, ""))[0]] == [b"1", b"2"], "a project of today"
    del projects.since[P]
    assert await texts.page(P, 0, "") == ([], "")


async def test_only_what_was_made_while_the_project_wants_texts_is_kept(texts: Kept, projects: Projects) -> None:
    before = made()
    await asyncio.sleep(0.002)
    projects.since[P] = time.time()
    after = made()
    assert not await texts.keep(P, before, SHOWN, "before") and await texts.keep(P, after, SHOWN, "after")
    projects.away = 1
    assert not await texts.keep(P, after, REJECTED, "nobody says that it may")
    del projects.since[P]
    assert not await texts.keep(P, after, REJECTED, "off")
    assert await of(texts, P) == [b"after"]


async def gone(texts: Kept, project: str, wanted: list[bytes]) -> None:
    for _ in range(1000):
        if (found := await of(texts, project)) == wanted:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"{project} still has {found}")


async def test_what_a_project_wants_no_more_goes_at_once(
    texts: Kept, projects: Projects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgetting, "_RETRIES", Backoff(first=timedelta(milliseconds=1)))
    await texts.keep("projects/gone", made(), SHOWN, "never")
    for project in (P, OTHER):
        await texts.keep(project, made(), SHOWN, "old")
    events = MemoryBus("ingest")
    running = asyncio.create_task(Forgetting(texts, events).run())

    async def tell(project: str) -> None:
        await events.publish(forgetting.CHANGED, project, ProjectChanged(project=project), id=str(time.time_ns()))

    for _ in range(50):  # turns of the loop, until it listens
        await asyncio.sleep(0)
    await tell(OTHER)  # it has another title now
    await tell("nonsense")
    await asyncio.sleep(0.002)
    projects.since[P] = time.time()  # off and on again, before anybody looked
    await texts.keep(P, made(), SHOWN, "new")
    await tell(P)
    projects.away = 2
    await gone(texts, P, [b"new"])
    del projects.since[OTHER]
    await tell(OTHER)
    await gone(texts, OTHER, [])
    assert await of(texts, P) == [b"new"] and not running.done()
    running.cancel()


async def test_what_was_missed_is_found_at_the_start(texts: Kept, projects: Projects) -> None:
    for project in (P, OTHER):
        await texts.keep(project, made(), SHOWN, "old")
    del projects.since[P]
    running = asyncio.create_task(Forgetting(texts, MemoryBus("ingest")).run())
    await gone(texts, P, [])
    assert await of(texts, OTHER) == [b"old"]
    running.cancel()


async def test_they_are_deleted_and_no_audit_record_holds_them(texts: Kept) -> None:
    await texts.keep(P, made(), SHOWN, "secret code")
    await texts.keep(OTHER, made(), SHOWN, "of another")
    with audit.gathering() as gathered:
        assert await texts.delete(P) == 1
    assert gathered.changes and "secret" not in str(audit.fill(audit.AuditRecord(), gathered.changes))
    assert await texts.page(P, 0, "") == ([], "")
    assert len((await texts.page(OTHER, 0, ""))[0]) == 1


async def test_a_store_that_fails_costs_the_text_only(projects: Projects, capsys: pytest.CaptureFixture[str]) -> None:
    class Down(MemoryState):
        async def create(self, key: str, value: bytes) -> Any:
            raise StateUnavailable("the bucket is full")

    texts = Kept(Table(Down(), KeptCompletion, missing=NotFound), projects)
    assert not await texts.keep(P, made(), SHOWN, "secret code")
    assert "secret" not in "".join(capsys.readouterr())


def test_long_texts_are_refused_without_being_repeated() -> None:
    kept.check("x" * kept.MOST_CHARACTERS)
    with pytest.raises(InvalidArgument) as refused:
        kept.check("secret" * 4000)
    assert refused.value.field == "text" and "secretsecret" not in refused.value.message
