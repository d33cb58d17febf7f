"""How one replica stands to the projects' policies, and who wants to hear when that changes."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field

from codegraft.common.v1.job_pb2 import Failure
from codegraft.inference.v1.serving_pb2 import Serving


@dataclass(slots=True)
class Standing:
    """How this replica stands to one project's policy."""

    serving: Serving | None = None
    """The newest policy seen; None while none is known."""
    tried: bool = False
    """Whether it was brought to the policy once, or to a reason why not: completions wait for that."""
    failure: Failure | None = None
    """Why the newest wanted version does not serve."""
    refused: set[str] = field(default_factory=set)
    """SHA-256 of versions that can never serve: not tried again until the policy is set anew."""
    passing: bool = False
    """Whether the failure is one that passes (the store, say), so that another try is due."""
    failures: int = 0
    """Tries in a row that ended so."""
    retrying: bool = False
    """Whether another try is planned."""
    waits: bool = False
    """Whether a version waits for a place in device memory."""
    homeless: bool = False
    """Whether this replica never served the project, because no place was free: there is no version before to go on
    with, and the base model would be another answer than what the policy says."""
    swap_seconds: float = 0.0
    """Duration of the last swap, from noticing to serving."""
    swap_trace: str = ""
    """Its traceparent, until the first completion on the new version; empty while spans are not recorded."""


class Standings:
    """The standings of all projects. All methods belong to one event loop."""

    def __init__(self) -> None:
        self._standings: defaultdict[str, Standing] = defaultdict(Standing)
        self._watchers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    def __getitem__(self, project: str) -> Standing:
        return self._standings[project]

    def __iter__(self) -> Iterator[str]:
        """The projects, as of now."""
        return iter(list(self._standings))

    def see(self, serving: Serving, project: str) -> bool:
        """Notes a policy unless a newer one is known; whether it was news."""
        standing = self._standings[project]
        if standing.serving is not None and int(standing.serving.etag or 0) >= int(serving.etag or 0):
            return False
        standing.serving = serving
        self.notify(project)
        return True

    def forget(self, project: str) -> None:
        """Its policy is gone: whoever asks for the project next finds it as one that nobody asked for yet."""
        self._standings.pop(project, None)
        self.notify(project)

    def notify(self, project: str) -> None:
        """Something about the project has changed."""
        for watcher in self._watchers[project]:
            watcher.set()

    async def changes(self, project: str) -> AsyncGenerator[None, None]:
        """Once now, then after every change of the project's policy or of what this replica serves for it."""
        changed = asyncio.Event()
        self._watchers[project].add(changed)
        try:
            while True:
                changed.clear()
                yield
                await changed.wait()
        finally:
            self._watchers[project].discard(changed)
