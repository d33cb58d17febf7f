"""With how many threads a step computes on a CPU: as many as were quickest lately.

Threads that share a product are quick while each has a core. When somebody else computes, too (a trainer on the same
machine, the thread that verifies an adapter), one of them waits at every product until the other is given a core again,
and fewer are quicker: a step of four streams on two cores takes 45 ms with two threads and 60 with one, but beside a
second engine 280 and 65. Waiting passively (OMP_WAIT_POLICY) costs less then, 80 ms, and as much all the time. Nobody
tells how much of the machine one has, so steps are timed. What is computed is the same.
"""

from __future__ import annotations

from collections import deque

from services.inference.engine.few import MOST
from services.inference.engine.speculate import FREE

_TRIED = 2
"""Steps of which the quicker says what a number of threads costs: one alone may have waited for code to be compiled."""
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
        self.threads = threads
        """Of the next step."""
        self._costs = {number: deque[float](maxlen=_TRIED) for number in (threads, threads // 2)}
        """By number of threads, of the latest steps: seconds for a token, and as if what a step takes without any were
        some more."""
        self._since = 0
        """Steps since the last try."""

    def took(self, tokens: int, seconds: float) -> None:
        """The step that :attr:`threads` was for has been computed."""
        if tokens > MOST:  # of a prompt: other products, which say nothing of those of the others
            return
        self._costs[self.threads].append(seconds / (FREE + tokens))
        self._since += 1
        if len(self._costs[self.threads]) < _TRIED:
            return
        quick, slow = sorted(self._costs, key=lambda threads: min(self._costs[threads], default=0.0))
        self.threads = quick
        if self._costs[quick] and self._since > self._rest(min(self._costs[slow]) / min(self._costs[quick])):
            self._costs[slow].clear()
            self.threads, self._since = slow, 0

    def _rest(self, ratio: float) -> float:
        """Steps until what was so much slower is tried again."""
        return min(max(_FEWEST, _TRIED * (ratio - 1) / _WASTE), _MOST)
