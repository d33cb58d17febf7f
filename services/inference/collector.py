"""Reads the replica's figures when Prometheus asks, in the scrape's thread."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.core.telemetry.metrics import PROJECTS
from services.inference import figures
from services.inference.adapters.registry import Registry
from services.inference.adapters.standing import Standings
from services.inference.adapters.swapper import converged

if TYPE_CHECKING:
    from services.inference.engine.scheduler import Scheduler
    from services.inference.model import LoadedModel


@dataclass(frozen=True, slots=True)
class _Seen:
    """The engine at one moment."""

    waiting: Counter[str]
    """Sequences by project."""
    oldest: float | None
    """When the first of them came, on the monotonic clock."""
    running: int
    places: int
    kv_use: float
    kv_cached: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    drafted_tokens: int
    right_tokens: int
    preemptions: int


class ReplicaCollector(Collector):
    """See the module.

    Args:
        namespace: of Kubernetes; empty elsewhere.
        loaded: gives the model once it is loaded.
    """

    def __init__(
        self,
        *,
        namespace: str,
        model: str,
        loaded: Callable[[], LoadedModel | None],
        registry: Registry,
        standings: Standings,
    ) -> None:
        self._namespace, self._model, self._loaded = namespace, model, loaded
        self._registry, self._standings = registry, standings

    def collect(self) -> Iterable[Metric]:
        """All families; those of the engine once there is one."""
        loaded = self._loaded()
        yield figures.MODEL_LOADED.read([((self._model,), loaded is not None)])
        yield from self._adapters()
        if loaded is None:
            yield figures.QUEUE_DEPTH.read([((self._namespace, ""), 0)])
        else:
            yield from self._engine(loaded.engine.look(_see))

    def _engine(self, seen: _Seen) -> Iterable[Metric]:
        waiting = Counter[str]({project: 0 for project in PROJECTS.known()})
        for project, count in seen.waiting.items():
            waiting[PROJECTS.of(project)] += count
        depths = waiting or {"": 0}  # a sum over nothing would be no figure
        yield figures.QUEUE_DEPTH.read(((self._namespace, project), count) for project, count in depths.items())
        waited = 0.0 if seen.oldest is None else time.monotonic() - seen.oldest
        for family, value in (
            (figures.QUEUE_OLDEST, waited),
            (figures.RUNNING, seen.running),
            (figures.PLACES, seen.places),
            (figures.KV_USE, seen.kv_use),
            (figures.KV_CACHED, seen.kv_cached),
            (figures.PROMPT_TOKENS, seen.prompt_tokens),
            (figures.CACHED_TOKENS, seen.cached_tokens),
            (figures.GENERATED_TOKENS, seen.generated_tokens),
            (figures.DRAFTED_TOKENS, seen.drafted_tokens),
            (figures.RIGHT_TOKENS, seen.right_tokens),
            (figures.PREEMPTIONS, seen.preemptions),
        ):
            yield family.read([((), value)])

    def _adapters(self) -> Iterable[Metric]:
        states = Counter("serving" if holding.projects else "idle" for holding in self._registry.holdings())
        yield figures.ADAPTERS.read(((state,), states[state]) for state in ("serving", "idle"))
        streams = Counter[tuple[str, str]]()
        for (project, sha256), count in self._registry.all_streams().items():
            streams[PROJECTS.of(project), sha256[:12] or "base"] += count
        yield figures.STREAMS.read(streams.items())
        behind, waiting = Counter[str](), Counter[str]()
        for project in self._standings:
            if (serving := self._standings[project].serving) is not None:
                label = PROJECTS.of(project)
                behind[label] |= not converged(serving, self._registry.route(project))
                waiting[label] |= bool(serving.waiting_sha256)
        yield figures.BEHIND.read(((project,), value) for project, value in behind.items())
        yield figures.WAITING.read(((project,), value) for project, value in waiting.items())


def _see(scheduler: Scheduler) -> _Seen:
    waiting, blocks = list(scheduler.waiting), scheduler.blocks
    return _Seen(
        waiting=Counter(sequence.project for sequence in waiting),
        oldest=min((sequence.submit_time for sequence in waiting), default=None),
        running=len(scheduler.running),
        places=scheduler.limits.running,
        kv_use=blocks.held / blocks.count,
        kv_cached=blocks.cached,
        prompt_tokens=scheduler.prompt_tokens,
        cached_tokens=scheduler.cached_tokens,
        generated_tokens=scheduler.generated_tokens,
        drafted_tokens=scheduler.drafted_tokens,
        right_tokens=scheduler.right_tokens,
        preemptions=scheduler.preemptions,
    )
