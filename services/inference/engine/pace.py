"""With how many threads a step computes on a CPU: as many as were quickest lately.

Threads that share a product are quick while each has a core. When somebody else computes, too (a trainer on the same
machine, the thread that verifies an adapter), one of them waits at every product until the other is given a core again,
and fewer are quicker: a step of four streams on two cores takes 45 ms with two threads and 60 with one, but beside a
second engine 280 and 65. Waiting passively (OMP_WAIT_POLICY) costs less then, 80 ms, and as much all the time. Nobody
tells how much of the machine one has, so steps are timed. What is computed is the same.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from services.inference.engine.few import MOST
from services.inference.engine.speculate import FREE

_TRIED = 2
"""Steps that try a number of threads: one alone may have waited for code to be compiled."""
_KEPT = 6
"""Latest steps of which the quickest says what a number of threads costs. Calls that are answered beside the steps make
some of them slower, those of all threads most: of two the quicker was too often one of these, and half of the threads
went on to be used (under overload a fifth of the time, bench/overload.py)."""
_WASTE = 0.02
"""Share of the time that may go into trying again what is slower."""
_FEWEST, _MOST = 32, 512
"""Steps between two tries."""


class Pace:
    """Chooses between all threads and half of them, step by step.

    Args:
        threads: at most, 2 or more.
    """

    def __init__(self, threads: int) -> None:
        self._quick, self._chosen = threads, threads
        self._others = 0
        """Who compute beside the steps, that this process knows of."""
        self._lock = threading.Lock()
        self._costs = {number: deque[float](maxlen=_KEPT) for number in (threads, threads // 2)}
        """By number of threads, of the latest steps: seconds for a token, and as if what a step takes without any were
        some more."""
        self._since = 0
        """Steps since the last try."""

    def crowded(self) -> int:
        """How many threads are left to a step in progress while others compute; 0 while nobody does."""
        return min(self._costs) if self._others else 0

    def threads(self, tokens: int) -> int:
        """For the next step, of so many tokens."""
        if self._others:
            return min(self._costs)
        return self._chosen if tokens <= MOST else self._quick

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Meanwhile steps leave half of the cores to who computes beside them; from any thread."""
        with self._lock:
            self._others += 1
        try:
            yield
        finally:
            with self._lock:
                self._others -= 1

    def took(self, threads: int, tokens: int, seconds: float) -> None:
        """A step has been computed with so many threads."""
        # A prompt's has other products, which say nothing of those of the others; nor does one with others beside it.
        if tokens > MOST or threads != self._chosen or self._others:
            return
        self._costs[threads].append(seconds / (FREE + tokens))
        self._since += 1
        if len(self._costs[threads]) < _TRIED:
            return
        quick, slow = sorted(self._costs, key=lambda threads: min(self._costs[threads], default=0.0))
        self._chosen = quick
        if not self._costs[quick]:  # that is its first try
            return
        self._quick = quick
        if self._since > self._rest(min(self._costs[slow]) / min(self._costs[quick])):
            self._costs[slow].clear()
            self._chosen, self._since = slow, 0

    def _rest(self, ratio: float) -> float:
        """Steps until what was so much slower is tried again."""
        return min(max(_FEWEST, _TRIED * (ratio - 1) / _WASTE), _MOST)
