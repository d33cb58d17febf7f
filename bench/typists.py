"""Editor sessions that type: every key's request replaces the one before, by its session or by hanging up.

What each session asks begins with a marker of its own, so that an answer of another one would be noticed: its text and
the number of its prompt's tokens are compared with those of the same request, asked again when nothing else runs.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.http import Connection

CODE = "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fib"
WHOLE = frozenset({"END_OF_TEXT", "STOP", "LENGTH"})
TRIES = 40
"""Of a session's last request, which is asked again as the server says."""
clock = time.perf_counter


@dataclass(slots=True)
class Ask:
    """One key's request, and what came of it."""

    session: int
    prompt: str
    streamed: bool
    has_session: bool
    """Whether it names its session, whose newer request takes its place."""
    outcome: str = "hung up"
    """whole, superseded, deadline, hung up, or a refusal's status and code."""
    text: str = ""
    prompt_tokens: int = 0
    seconds: float = 0.0
    retry_after: float = 0.0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Office:
    """Where the typists' requests go."""

    port: int
    key: str
    model: str
    tokens: int
    """Of each answer, at most."""

    async def ask(self, ask: Ask) -> None:
        """Asks, and notes what came of it; hangs up when it is cancelled."""
        began, connection = clock(), None
        name = f"s{ask.session}-{random.getrandbits(48):012x}"
        body = {"model": self.model, "prompt": ask.prompt, "max_tokens": self.tokens, "stream": ask.streamed}
        headers = {"X-Request-Id": name}
        if ask.has_session:
            headers["X-Codegraft-Session"] = f"s{ask.session}"
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            connection = await Connection.open(self.port)
            status, head, data = await connection.post("/v1/completions", body, headers)
            if head["x-request-id"] != name:
                ask.faults.append(f"the answer to {name} is that to {head['x-request-id']}")
            _read(ask, status, head, data)
        except (OSError, EOFError) as error:
            ask.outcome = type(error).__name__
            ask.faults.append(f"the connection broke: {error!r}")
        finally:
            if connection is not None:
                connection.close()
            ask.seconds = clock() - began


def _read(ask: Ask, status: int, head: dict[str, str], data: bytes) -> None:
    if status != 200:
        ask.outcome = f"{status} {json.loads(data)['error']['code']}"
        ask.retry_after = float(head.get("retry-after", "0"))
        if status >= 500 or not ask.retry_after:
            ask.faults.append(f"{ask.outcome}, to come back after {ask.retry_after} s")
        return
    if ask.streamed:
        events = [line[6:] for line in data.decode().splitlines() if line.startswith("data: ")]
        if events[-1] != "[DONE]":
            ask.faults.append("a stream has no end")
        parts = [json.loads(event) for event in events[:-1]]
    else:
        parts = [json.loads(data)]
        ask.prompt_tokens = parts[0]["usage"]["prompt_tokens"]
    if broken := [part["error"] for part in parts if "error" in part]:
        ask.outcome = f"broken off, {broken[0]['code']}"
        ask.faults.append(ask.outcome)
        return
    choices = [choice for part in parts for choice in part["choices"]]
    ask.text = "".join(choice["text"] for choice in choices)
    reason = choices[-1]["codegraft_reason"]
    ask.outcome = "whole" if reason in WHOLE else reason.lower()


@dataclass(slots=True)
class Typing:
    """What became of all requests."""

    asks: list[Ask]
    late: int
    """Keys that came more than one key's time after they should have."""

    def outcomes(self) -> Counter[str]:
        return Counter(ask.outcome for ask in self.asks)

    def faults(self) -> list[str]:
        """What must not be, whatever the load."""
        found = [f"session {ask.session}: {fault}" for ask in self.asks for fault in ask.faults]
        last = {ask.session: ask for ask in self.asks}
        return found + [f"session {n} ended {ask.outcome}" for n, ask in last.items() if ask.outcome != "whole"]

    def whole(self) -> list[Ask]:
        return [ask for ask in self.asks if ask.outcome == "whole"]


async def type_all(office: Office, *, sessions: int, keys_a_second: float, seconds: float, patience: float) -> Typing:
    """All sessions at once.

    Args:
        patience: seconds after the last key within which every request has to end.

    Raises:
        TimeoutError: one hangs.
    """
    asks: list[list[Ask]] = [[] for _ in range(sessions)]
    typing = (_type(office, number, asks[number], keys_a_second, seconds) for number in range(sessions))
    async with asyncio.timeout(seconds + patience):
        late = sum(await asyncio.gather(*typing))
    return Typing([ask for each in asks for ask in each], late)


async def _type(office: Office, number: int, asks: list[Ask], keys_a_second: float, seconds: float) -> int:
    """Types through the code, once over and then anew. Every second session has no name, and hangs up on the request
    before."""
    draw = random.Random(number)
    await asyncio.sleep(draw.random() / keys_a_second)
    hangs_up, late, presses = number % 2 == 0, 0, int(seconds * keys_a_second)
    running: set[asyncio.Task[None]] = set()
    begin, start = clock(), draw.randrange(10, 30)
    for press in range(presses):
        due = begin + press / keys_a_second
        late += clock() > due + 1 / keys_a_second
        await asyncio.sleep(max(0.0, due - clock()))
        if hangs_up:
            for task in running:
                task.cancel()
        typed = CODE[: start + press % (len(CODE) - start)]
        prompt = f"# session {number:04d}\n{typed}"
        asks.append(Ask(number, prompt, streamed=number % 4 > 1, has_session=not hangs_up))
        task = asyncio.create_task(office.ask(asks[-1]))
        running.add(task)
        task.add_done_callback(running.discard)
    for ended in await asyncio.gather(*running, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended
    for _ in range(TRIES):  # who stops typing waits for the answer
        last = asks[-1]
        if not last.retry_after:
            break
        await asyncio.sleep(last.retry_after * draw.uniform(1, 2))
        asks.append(Ask(number, last.prompt, last.streamed, last.has_session))
        await office.ask(asks[-1])
    return late


async def replayed(office: Office, asks: list[Ask], differs: Callable[[Ask, Ask], None]) -> int:
    """Asks the same again one after the other, and tells which answers are others; returns how many were asked."""
    for ask in asks:
        again = Ask(ask.session, ask.prompt, streamed=False, has_session=False)
        await office.ask(again)
        if again.text != ask.text or ask.prompt_tokens not in (0, again.prompt_tokens):
            differs(ask, again)
    return len(asks)
