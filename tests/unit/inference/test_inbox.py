"""What the engine's thread delivers: in order, with one wake-up of the loop, and as one where the reader is late."""

from __future__ import annotations

import asyncio
import threading

import pytest

from services.inference.adapters.registry import Registry
from services.inference.engine.sequence import Output, Reason, TokenLogprob
from services.inference.inbox import Inbox, Post


def in_a_thread(*outputs: tuple[Inbox, int, Output]) -> None:
    """Delivers while the loop stands, as a step does that ends while the loop is busy."""
    thread = threading.Thread(target=lambda: [inbox.door(index)(output) for inbox, index, output in outputs])
    thread.start()
    thread.join()


async def test_a_step_wakes_the_loop_once_however_many_answers_it_delivers_to(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, post, loop = Registry(), Post(), asyncio.get_running_loop()
    inboxes = [Inbox(1, registry.pin_base("p"), post) for _ in range(50)]
    woken, wake = [], loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call: (woken.append(call), wake(*call)))
    for step in ("a", "b"):
        woken.clear()
        in_a_thread(*((inbox, 0, Output(text=step)) for inbox in inboxes))
        assert len(woken) == 1
        assert [(await inbox.get())[1].text for inbox in inboxes] == [step] * 50


async def test_outputs_that_wait_are_one_and_every_sequence_keeps_its_own() -> None:
    registry, post = Registry(), Post()
    inbox = Inbox(2, registry.pin_base("p"), post)
    one, other = (TokenLogprob(token, -1.0) for token in (1, 2))
    in_a_thread(
        (inbox, 0, Output(started=True)),
        (inbox, 0, Output(text="a", tokens=1, logprobs=(one,))),
        (inbox, 0, Output(text="b", tokens=2, logprobs=(other,))),
        (inbox, 1, Output(text="x", tokens=1)),
        (inbox, 0, Output(text="c", tokens=1, reason=Reason.STOP)),
    )
    assert await inbox.get() == (0, Output(started=True, text="ab", tokens=3, logprobs=(one, other)))
    assert await inbox.get() == (1, Output(text="x", tokens=1))
    assert inbox.awaited == {0, 1} and registry.streams("p") == {"": 1}, "the version is held until the last one ends"
    assert await inbox.get() == (0, Output(text="c", tokens=1, reason=Reason.STOP))
    waiting = asyncio.ensure_future(inbox.get())
    await asyncio.sleep(0)
    in_a_thread((inbox, 1, Output(reason=Reason.LENGTH)))
    assert await asyncio.wait_for(waiting, 5) == (1, Output(reason=Reason.LENGTH))
    assert inbox.awaited == set() and registry.streams("p") == {}


def test_what_comes_after_the_end_of_the_loop_only_frees_the_version() -> None:
    registry = Registry()

    async def begin() -> Inbox:
        return Inbox(1, registry.pin_base("p"), Post())

    inbox = asyncio.run(begin())
    inbox.door(0)(Output(reason=Reason.CANCELLED))
    assert registry.streams("p") == {}
