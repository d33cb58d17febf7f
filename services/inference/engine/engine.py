"""The step loop, in a thread of its own: plan, compute, deliver.

Everything else talks to it through :meth:`Engine.submit` and :meth:`Engine.cancel`, which never wait for a step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from services.core import log
from services.core.errors import ShuttingDown
from services.inference.engine.scheduler import Limits, Scheduler, Work
from services.inference.engine.sequence import Output, Reason, Result, Sequence

_log = log.get("inference.engine")
T = TypeVar("T")


class StepRunner(Protocol):
    """What the loop needs of the runner."""

    def begin(self) -> None: ...

    def step(self, work: list[Work]) -> list[Result | None]: ...

    def release(self, sequence: Sequence) -> None: ...


class Engine:
    """Runs sequences until they end; each one's outputs go to its ``deliver``, from the engine's thread."""

    def __init__(self, runner: StepRunner, limits: Limits) -> None:
        self._runner = runner
        self._scheduler = Scheduler(limits)
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop after the step in progress; sequences that still run end as CANCELLED."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def load(self) -> tuple[int, int]:
        """(running, waiting) sequences."""
        with self._changed:
            return len(self._scheduler.running), len(self._scheduler.waiting)

    @property
    def blocks_held(self) -> int:
        """Blocks of the KV cache that sequences hold; what is only cached does not count."""
        with self._changed:
            return self._scheduler.blocks.held

    @property
    def prefix_tokens(self) -> tuple[int, int]:
        """(found in the cache, admitted) prompt tokens since the start."""
        with self._changed:
            return self._scheduler.cached_tokens, self._scheduler.prompt_tokens

    @property
    def drafted_tokens(self) -> tuple[int, int]:
        """(right, all) tokens that were guessed since the start."""
        with self._changed:
            return self._scheduler.right_tokens, self._scheduler.drafted_tokens

    @property
    def preemptions(self) -> int:
        """Times that a sequence had to give up its blocks, since the start."""
        with self._changed:
            return self._scheduler.preemptions

    def check(self, project: str, session: str, count: int, deadline: float | None) -> None:
        """Lets through who would be queued now: before the work on a prompt that would be refused.

        Args:
            session: of the project, as of a sequence.
            count: of the request's sequences.
            deadline: on the monotonic clock.

        Raises:
            QueueFull: as the scheduler says.
        """
        left = None if deadline is None else deadline - time.monotonic()
        with self._changed:
            self._scheduler.admit(project, session, count, left)

    def submit(self, sequence: Sequence, *others: Sequence) -> None:
        """Queues a sequence, and others of the same request with it: all or none.

        Raises:
            QueueFull, InvalidArgument: as the scheduler says.
            ShuttingDown: the engine is stopping.
        """
        with self._changed:
            if self._stopping:
                raise ShuttingDown("this replica is shutting down", retry_after=0.5)
            for one in (sequence, *others):
                one.submit_time = time.monotonic()
            self._scheduler.submit(sequence, *others)
            self._changed.notify()

    @contextmanager
    def calm(self) -> Iterator[None]:
        """Meanwhile steps are short: they make no guesses."""
        with self._changed:
            self._scheduler.calm += 1
        try:
            yield
        finally:
            with self._changed:
                self._scheduler.calm -= 1

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence before its next step; one that has ended already is fine."""
        with self._changed:
            sequence.cancelled = sequence.cancelled or Reason.CANCELLED
            self._changed.notify()

    def look(self, read: Callable[[Scheduler], T]) -> T:
        """What a function reads of the scheduler, between two of its changes. It must be quick: the loop waits."""
        with self._changed:
            return read(self._scheduler)

    def _loop(self) -> None:
        self._runner.begin()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or len(self._scheduler))
                if self._stopping:
                    for sequence in (*self._scheduler.waiting, *self._scheduler.running):
                        sequence.cancelled = sequence.cancelled or Reason.CANCELLED
                plan = self._scheduler.plan(time.monotonic())
            for sequence, reason in plan.ended:
                self._end(sequence, sequence.close(reason))
            if self._stopping and not plan.work:
                return
            for sequence in plan.admitted:
                sequence.deliver(Output(started=True))
            if plan.work:
                self._step(plan.work)

    def _step(self, work: list[Work]) -> None:
        try:
            results = self._runner.step(work)
        except Exception:
            _log.exception("a step failed; its sequences end", sequences=len(work))
            ended = [(item.sequence, item.sequence.close(Reason.FAILED)) for item in work]
        else:
            ended = self._take(work, results)
            with self._changed:
                self._scheduler.commit(work, results)
        if ended:
            with self._changed:
                self._scheduler.remove((sequence for sequence, _ in ended), time.monotonic())
        for sequence, output in ended:
            self._end(sequence, output)

    def _take(self, work: list[Work], results: list[Result | None]) -> list[tuple[Sequence, Output]]:
        """Hands every sequence its result; the last outputs of those that ended with it."""
        now, ended = time.monotonic(), []
        for item, result in zip(work, results, strict=True):
            if result is None:
                continue
            item.sequence.first_token_time = item.sequence.first_token_time or now
            output = item.sequence.take(result)
            if output is not None and output.reason is not None:
                ended.append((item.sequence, output))
            elif output is not None:
                item.sequence.deliver(output)
        return ended

    def _end(self, sequence: Sequence, output: Output) -> None:
        self._runner.release(sequence)
        sequence.deliver(output)
