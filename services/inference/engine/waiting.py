"""Who waits for a place in the engine, and who is next. Knows no torch.

Fair between projects: of those that wait, the project that holds the fewest places is next, and of several the one
whose last turn is longest ago; within a project, whoever came first. So while others wait a project gets no more than
its share of the places, alone it may hold all of them, and one that sends thousands of requests delays its own only.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping

from services.inference.engine.sequence import Sequence


class Waiting:
    """The queue."""

    def __init__(self) -> None:
        self._returned: deque[Sequence] = deque()
        self._queues: OrderedDict[str, deque[Sequence]] = OrderedDict()
        """By project, none empty; whose turn is longest ago comes first."""

    def __len__(self) -> int:
        return len(self._returned) + sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._returned
        for queue in self._queues.values():
            yield from queue

    def add(self, sequence: Sequence) -> None:
        """Takes in a new one."""
        self._queues.setdefault(sequence.project, deque()).append(sequence)

    def give_back(self, sequence: Sequence) -> None:
        """Takes in one that had a place and lost its memory: nobody may overtake it, see the scheduler."""
        self._returned.appendleft(sequence)

    def next(self, held: Mapping[str, int], most: int) -> Sequence | None:
        """Who gets the next place; None when nobody may have one now.

        Args:
            held: places by project.
            most: places of one project.
        """
        if self._returned:
            return self._returned[0]
        heads = (queue[0] for queue in self._queues.values())
        able = [head for head in heads if held.get(head.project, 0) < most and not _would_share_soon(head)]
        return min(able, key=lambda head: held.get(head.project, 0), default=None)

    def take(self, sequence: Sequence) -> None:
        """Lets out the one that :meth:`next` named."""
        if self._returned:
            self._returned.popleft()
            return
        queue = self._queues.pop(sequence.project)
        queue.popleft()
        if queue:
            self._queues[sequence.project] = queue  # behind the others

    def remove(self, numbers: set[int]) -> None:
        """Lets out those with these numbers."""
        self._returned = deque(s for s in self._returned if s.number not in numbers)
        for project, queue in list(self._queues.items()):
            left = deque(s for s in queue if s.number not in numbers)
            if left:
                self._queues[project] = left
            else:
                del self._queues[project]


def _would_share_soon(sequence: Sequence) -> bool:
    """Whether another computes the same prompt now: a step or two, and its blocks are there for both."""
    first = sequence.after
    return first is not None and first.table is not None and first.computed < len(first.prompt)
