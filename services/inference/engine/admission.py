"""Who may join the queue, and how long those who may not should stay away. Knows no torch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from services.core.errors import QueueFull
from services.inference.engine.sequence import Reason, Sequence

if TYPE_CHECKING:
    from services.inference.engine.scheduler import Limits

_LEARN = 0.1
"""Weight of the last sequence in the mean time that they hold a place."""
_CAUTION = 2.5
"""Times the expected wait that a deadline has to leave time for: others come meanwhile, some of whom go first, and the
machine may be slower by then. Whoever is late has taken a place for nothing; a queue that is shorter costs nothing, as
long as there is one."""
_SHORTEST_RETRY, _LONGEST_RETRY = 0.05, 60.0


class Admission:
    """Knows the limits of the queue, and from the sequences that left how fast it moves."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._stay = 0.0
        """Seconds that sequences hold a place, a moving mean; 0 before the first one has left."""

    def left(self, sequence: Sequence, now: float) -> None:
        """Learns from one that gave its place free."""
        assert sequence.start_time is not None
        stayed = now - sequence.start_time
        if sequence.cancelled is Reason.DEADLINE:  # it would have stayed longer
            stayed = max(stayed, self._stay)
        self._stay += (_LEARN if self._stay else 1.0) * (stayed - self._stay)

    def check(self, project: str, count: int, left: float | None, queued: list[str], running: list[str]) -> None:
        """Lets the new sequences of a project's request through, all or none.

        Args:
            count: of them. Those that are more than may wait at all come in where nobody waits.
            left: seconds until their deadline; None when they have none.
            queued: projects of those that wait before it.
            running: projects of those that have places.

        Raises:
            QueueFull: too many wait already, of all or of the project, or for too long to meet the deadline.
        """
        counts, held = Counter(queued), Counter(running)
        own, wait = counts[project], self._wait(project, counts, held)
        hint = "Retry later, or run more replicas."
        if counts and counts.total() + count > self._limits.waiting:
            problem = f"{counts.total()} completions wait already"
        elif own and own + count > self._limits.project_waiting:
            problem = f"{own} completions of {project or 'one project'} wait already"
        elif left is not None and wait:
            # Who would be out of time before its end takes the place of one who is not: under overload nobody would
            # get a whole completion any more. Half of its time is enough, for one that is longer than others.
            if _CAUTION * wait + min(self._stay, left / 2) <= left:
                return
            problem = f"it would wait {wait:.1f} s of {left:.1f} s until its deadline"
            hint += " Or give more time."
        else:
            return
        retry = min(max(wait, _SHORTEST_RETRY), _LONGEST_RETRY) if self._stay else self._limits.retry_seconds
        raise QueueFull(problem, hint=hint, retry_after=retry)

    def _wait(self, project: str, queued: Counter[str], held: Counter[str]) -> float:
        """Seconds until a project's next sequence gets a place, if all hold theirs as long as the last ones did."""
        own = queued[project]
        ahead = sum(min(count, own + 1) for name, count in queued.items() if name != project)  # they take turns with it
        turns = (ahead + own + 1 + held.total() - self._limits.running) / self._limits.running
        own_turns = (own + 1 + held[project] - self._limits.project_running) / self._limits.project_running
        return self._stay * max(turns, own_turns, 0.0)
