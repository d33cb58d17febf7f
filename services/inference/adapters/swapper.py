"""One swap: from a project's policy to a new route, or to a reason why the old one stays."""

from __future__ import annotations

import time
from contextlib import suppress

from codegraft.common.v1.job_pb2 import Failure
from codegraft.event.v1.events_pb2 import SwapPhases
from codegraft.inference.v1.serving_pb2 import SERVING_MODE_OFF, Serving
from services.core import log
from services.core.errors import CodegraftError, ResourceExhausted
from services.core.telemetry import tracing
from services.inference import figures
from services.inference.adapters.loader import Device, Loaded, Loader
from services.inference.adapters.news import News
from services.inference.adapters.registry import Registry
from services.inference.adapters.route import Route, Version
from services.inference.adapters.standing import Standings

_log = log.get("inference.swapper")


class Swapper:
    """Swaps, one at a time a project: the caller sees to that. All methods belong to one event loop."""

    def __init__(self, loader: Loader, registry: Registry, standings: Standings, news: News) -> None:
        self._loader, self._registry, self._standings, self._news = loader, registry, standings, news

    async def swap(
        self, project: str, device: Device, began: float, *, ready: Loaded | None = None, patience: float = 0.0
    ) -> None:
        """Flips to the wanted versions, if they are others and verify. Both sides of a split flip at once.

        A side that does not verify stays out: instead of the main version the one before goes on, instead of a split
        the main version answers all.

        Args:
            began: when the change was noticed, on the monotonic clock.
            ready: a version that was loaded for this already.
            patience: seconds to wait for a place in device memory.
        """
        standing, before = self._standings[project], self._registry.route(project)
        serving = standing.serving or Serving()
        phases = SwapPhases()
        if ready:
            phases.CopyFrom(ready.phases)
        main, second, percent, placed = before.main, None, 0, True
        try:
            name, sha256 = serving.wanted_checkpoint, wanted(serving)
            main = await self._version(project, name, sha256, began, device, phases, patience)
        except _NotServed as refusal:
            placed = not refusal.for_want_of_a_place
            if before.main is None and sha256 in standing.refused:
                main = await self._one_before(project, serving, began, device, phases, patience)
        with suppress(_NotServed):
            if serving.HasField("split"):
                name, sha256 = serving.split.checkpoint, serving.split.sha256
                second = await self._version(project, name, sha256, began, device, phases, patience)
                percent = serving.split.percent
        standing.tried = standing.tried or placed
        standing.homeless = not standing.tried
        now = Route(main, second, percent)
        if now == before:
            return
        self._registry.flip(project, now)
        if now.same_as(before):  # the same weights by another run's name
            self._standings.notify(project)
            return
        if converged(serving, now):
            standing.failure = None
        standing.swap_seconds = time.monotonic() - began
        checkpoint = main.checkpoint if main else ""
        about = {"codegraft.project": project, "codegraft.checkpoint": checkpoint}
        standing.swap_trace = tracing.took("adapter swap", standing.swap_seconds, attributes=about)
        figures.swapped(phases, standing.swap_seconds)
        _log.info("swapped", project=project, checkpoint=checkpoint, seconds=round(standing.swap_seconds, 4))
        self._standings.notify(project)
        await self._news.swapped(project, before, now, phases, standing.swap_seconds)

    async def _one_before(
        self, project: str, serving: Serving, began: float, device: Device, phases: SwapPhases, patience: float
    ) -> Version | None:
        """What the policy came to before a version that can never serve: it goes on at the replicas that had it, and
        one that starts later is no other."""
        failure = self._standings[project].failure
        try:
            for each in serving.history:
                if each.sha256 != wanted(serving):
                    with suppress(_NotServed):
                        return await self._version(
                            project, each.checkpoint, each.sha256, began, device, phases, patience
                        )
            return None
        finally:
            self._standings[project].failure = failure

    async def refuse(self, project: str, checkpoint: str, sha256: str, error: CodegraftError, began: float) -> None:
        """Notes why a version does not serve. One that can never serve is not tried again; an outage passes."""
        standing = self._standings[project]
        figures.REFUSED.labels(error.reason).inc()
        standing.failure = Failure(reason=error.reason, message=error.message, hint=error.hint)
        _log.warning("adapter refused", project=project, checkpoint=checkpoint, reason=error.reason, why=error.message)
        self._standings.notify(project)
        if error.is_callers_fault:
            standing.refused.add(sha256)
            standing.failures = 0
            route = self._registry.route(project)
            await self._news.rejected(project, checkpoint, sha256, error, route, time.monotonic() - began)
        else:
            standing.passing = True
            standing.waits = standing.waits or isinstance(error, ResourceExhausted)

    async def _version(
        self,
        project: str,
        checkpoint: str,
        sha256: str,
        began: float,
        device: Device,
        phases: SwapPhases,
        patience: float,
    ) -> Version | None:
        """That version, staged unless it is on the route already: there the next stream stages it."""
        if not sha256:
            return None
        route = self._registry.route(project)
        named = (checkpoint, sha256)
        if there := next((v for v in (route.main, route.second) if v and (v.checkpoint, v.sha256) == named), None):
            return there
        if sha256 in self._standings[project].refused:
            raise _NotServed(for_want_of_a_place=False)
        try:
            loaded = await self._loader.load(checkpoint, device, sha256=sha256, patience=patience)
        except CodegraftError as error:
            await self.refuse(project, checkpoint, sha256, error, began)
            raise _NotServed(for_want_of_a_place=isinstance(error, ResourceExhausted)) from None
        for phase in SwapPhases.DESCRIPTOR.fields_by_name:
            setattr(phases, phase, getattr(phases, phase) + getattr(loaded.phases, phase))
        return loaded.version


class _NotServed(Exception):
    """A version that was refused, and it was told why."""

    def __init__(self, *, for_want_of_a_place: bool) -> None:
        super().__init__()
        self.for_want_of_a_place = for_want_of_a_place


def wanted(serving: Serving) -> str:
    """SHA-256 of the version that a policy resolves to; empty for the base model."""
    return "" if serving.mode == SERVING_MODE_OFF else serving.wanted_sha256


def converged(serving: Serving, route: Route) -> bool:
    """Whether a route is what the policy wants."""
    main, second = _named(route.main), _named(route.second)
    asked = (serving.wanted_checkpoint, wanted(serving)) if wanted(serving) else _named(None)
    split = (serving.split.checkpoint, serving.split.sha256, serving.split.percent)
    return (asked, split) == (main, (*second, route.percent))


def _named(version: Version | None) -> tuple[str, str]:
    """By its name, too: the same weights may be refused by another one."""
    return (version.checkpoint, version.sha256) if version else ("", "")
