"""Brings this replica to what every project's policy wants, and keeps it there.

The policy with what it resolves to is durable (policy.py), so a cold replica starts on it without any event. Events of
the trainer make a new best known at once; a reconcile asks the trainer again every so often, so that a lost or repeated
event changes nothing. A new best is fetched, verified and staged first; only then the policy resolves to it and the
route is flipped. Whatever is wrong with it, the version before goes on serving, also on replicas that start later.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any

from opentelemetry.trace import SpanKind

from codegraft.event.v1.events_pb2 import BestCheckpointChanged
from codegraft.inference.v1.serving_pb2 import (
    SERVING_MODE_LATEST_BEST,
    SERVING_MODE_PINNED,
    Serving,
    ServingMode,
    Split,
)
from services.core import log, names
from services.core.backoff import Backoff
from services.core.errors import BaseModelMismatch, CheckpointNotFound, CodegraftError, StoreUnavailable
from services.core.events import Event, EventBus
from services.core.rpc.context import without_deadline
from services.core.state import Table
from services.core.telemetry import tracing
from services.inference.adapters.bests import Bests
from services.inference.adapters.holds import Holds
from services.inference.adapters.loader import Device, Loaded, Loader
from services.inference.adapters.manifests import Manifests
from services.inference.adapters.news import News
from services.inference.adapters.registry import Registry
from services.inference.adapters.route import Route
from services.inference.adapters.standing import Standing, Standings
from services.inference.adapters.swapper import Swapper
from services.inference.policy import BASE, Best, BestSource, Choice, Policies, approve, follow_best, named, set_mode

BEST = "codegraft.trainer.checkpoint.best.v1"

_RETRIES = Backoff(first=timedelta(milliseconds=500), longest=timedelta(seconds=20))
_AT_ONCE = 4
"""Projects that are brought to their policies at once, beside those that somebody asks for: a cold replica of many must
still answer."""
_NEWS = timedelta(minutes=5)
"""Age up to which a policy belongs to the trace of who set it."""
_FIRST_WAIT = 3.0
"""Seconds that the first completion of a project waits for a place for its version."""
_PLACE_WAIT = 5.0
"""Seconds that a person's approval waits for a place in device memory."""
_log = log.get("inference.follower")


class Follower:
    """See the module. All methods belong to one event loop.

    Args:
        table: the policies.
        reconcile: seconds between two questions to the trainer, and the most a lost event can cost.
        replica: this replica's name in events.
    """

    def __init__(
        self,
        *,
        table: Table[Serving],
        events: EventBus,
        manifests: Manifests,
        loader: Loader,
        registry: Registry,
        bests: BestSource,
        replica: str,
        reconcile: float,
    ) -> None:
        self._table, self._policies = table, Policies(table)
        self._events, self._manifests, self._loader, self._trainer = events, manifests, loader, bests
        self._registry, self._news, self._standings = registry, News(events, replica), Standings()
        self._swapper = Swapper(loader, registry, self._standings, self._news)
        self._holds = Holds(bests)
        self._bests = Bests(bests, manifests, loader, self._policies, self._standings, self._swapper, self._news)
        self._reconcile = reconcile
        self._device: asyncio.Future[Device] = asyncio.get_running_loop().create_future()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._firsts: dict[str, asyncio.Task[None]] = {}
        """By project that somebody asked for: it is brought to its policy for the first time."""
        loop = asyncio.get_running_loop()

        def place_freed() -> None:  # called by the engine's thread, also after the end of the loop
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._place_freed)

        registry.listen(place_freed)

    def model_loaded(self, device: Device) -> None:
        """Adapters can be staged from now on."""
        if not self._device.done():
            self._device.set_result(device)

    @property
    def standings(self) -> Standings:
        """How this replica stands to the policies of all projects."""
        return self._standings

    def standing(self, project: str) -> Standing:
        """How this replica stands to a project's policy."""
        return self._standings[project]

    def changes(self, project: str) -> AsyncGenerator[None, None]:
        """Once now, then after every change of the project's policy or of what this replica serves for it."""
        return self._standings.changes(project)

    async def run(self) -> None:
        """Follows policies and events until cancelled."""
        await self._device
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow_policies())
                group.create_task(self._follow_bests())
                group.create_task(self._reconcile_always())
        finally:
            for task in (*self._tasks, *self._firsts.values()):
                task.cancel()

    # --- what people decide ---

    async def ensure(self, project: str, *, confirmed: bool) -> None:
        """Brings a project that nobody asked for yet to its policy; later calls return at once.

        A project without a policy gets its first one here, so that every replica follows it from now on. It goes on
        when the caller gives up: whoever asks next waits for the rest of it.

        Args:
            confirmed: the project is known to exist. Of one that may be there or not nothing is written.

        Raises:
            Unavailable: the state store does not answer.
        """
        if self._standings[project].tried:
            return
        if (first := self._firsts.get(project)) is None:
            loop = asyncio.get_running_loop()
            first = self._firsts[project] = loop.create_task(
                self._first(project, confirmed), context=without_deadline()
            )
            first.add_done_callback(lambda done: self._first_done(project, done))
        await asyncio.shield(first)

    async def _first(self, project: str, confirmed: bool) -> None:
        async with self._locks[project]:
            if self._standings[project].tried:
                return
            if (serving := await self._policies.find(project)) is None:
                if not confirmed:
                    return
                began = time.monotonic()
                best = await self._bests.verified(project, await self._device, began)
                serving = await self._policies.change(project, lambda s: follow_best(s, best[0]) if best else None)
            self._standings.see(serving, project)
            await self._converge(project, time.monotonic(), patience=_FIRST_WAIT)

    def _first_done(self, project: str, first: asyncio.Task[None]) -> None:
        del self._firsts[project]
        if not first.cancelled():
            first.exception()  # it was told to those who waited, if anybody did

    async def set_policy(
        self, project: str, mode: ServingMode, checkpoint: str, split: Split | None, etag: str
    ) -> Serving:
        """Sets a project's policy, and brings this replica to it as far as that can be done now.

        Raises:
            CheckpointNotFound, BaseModelMismatch: it names a checkpoint that is not there or does not fit.
            StoreUnavailable: it names one that this replica has not seen yet, and the store does not answer.
            EtagMismatch: the policy is not at that etag.
        """
        began = time.monotonic()
        forgiven = self._forgive(project)
        pinned = await self._choice(checkpoint, "checkpoint") if mode == SERVING_MODE_PINNED else BASE
        if split is not None:
            second = await self._choice(split.checkpoint, "split.checkpoint") if split.checkpoint else BASE
            split = Split(checkpoint=second.checkpoint, sha256=second.sha256, percent=split.percent)
        # Resolved before the one write, so that no replica ever falls back to the base model in between.
        best: Best | Choice | None = None
        if mode == SERVING_MODE_LATEST_BEST and self._device.done():
            device = self._device.result()
            if found := await self._bests.verified(project, device, began):
                best = found[0]
            elif await self._bests.none(project, device.base.model):
                best = BASE

        def change(serving: Serving) -> None:
            set_mode(serving, mode, pinned, best, split)
            if forgiven:  # the other replicas, which have refused it, too, hear of what is written only
                serving.update_time.GetCurrentTime()

        return await self._decide(project, await self._policies.change(project, change, etag=etag), began)

    async def approve(self, project: str, checkpoint: str, etag: str) -> Serving:
        """Lets the waiting checkpoint serve, if it still verifies.

        Raises:
            FailedPrecondition: it does not wait.
            AdapterRejected, CheckpointNotFound …: as :meth:`Loader.load`.
            EtagMismatch: the policy is not at that etag.
        """
        began, serving = time.monotonic(), await self._policies.get(project)
        self._forgive(project)
        if serving.waiting_checkpoint == checkpoint and self._device.done():
            device, sha256 = self._device.result(), serving.waiting_sha256
            await self._loader.load(checkpoint, device, sha256=sha256, patience=_PLACE_WAIT)
        serving = await self._policies.change(project, lambda s: approve(s, checkpoint), etag=etag)
        return await self._decide(project, serving, began)

    def _forgive(self, project: str) -> bool:
        """A person decides anew: what was refused before may be tried again. Whether anything was."""
        standing = self._standings[project]
        forgiven = bool(standing.refused)
        standing.refused.clear()
        standing.failure = None
        return forgiven

    async def _decide(self, project: str, serving: Serving, began: float) -> Serving:
        self._standings.see(serving, project)
        await self._news.changed(serving)
        if self._device.done():
            async with self._locks[project]:
                await self._converge(project, began)
        return serving

    async def _choice(self, checkpoint: str, field: str) -> Choice:
        """What a person names, with what the store says of it."""
        await self._keep(checkpoint)
        try:
            manifest = await self._manifests.get(checkpoint, fresh=True)
        except CheckpointNotFound as error:
            error.field = field
            raise
        if self._device.done() and manifest.base_digest != self._device.result().base.digest:
            raise BaseModelMismatch(
                f"{checkpoint} was trained on {manifest.base_model} with other weights than those served",
                field=field,
                hint="Choose a checkpoint of the served base model.",
            )
        loss = manifest.test_loss if manifest.HasField("test_loss") else None
        try:
            test_set = await self._manifests.test_set(checkpoint)
        except StoreUnavailable:  # the way back from a bad version must not need the store
            test_set = ""
        return Choice(manifest.name, manifest.sha256, loss, test_set)

    async def _keep(self, checkpoint: str) -> None:
        """Asks the trainer not to delete what a policy names. Without it the policy works all the same: it may be the
        way out of an outage."""
        try:
            await self._trainer.keep(checkpoint)
        except CodegraftError as error:
            _log.warning("the trainer does not keep a checkpoint", checkpoint=checkpoint, error=error.message)

    # --- what happens by itself ---

    async def _follow_policies(self) -> None:
        async for change in self._table.follow():
            if change.message is not None:
                self._spawn(self._policy_changed(change.message, time.monotonic(), change.traceparent))
            else:
                self._spawn(self._policy_gone(names.project_of(change.name)))

    async def _policy_changed(self, serving: Serving, began: float, traceparent: str) -> None:
        project = names.project_of(serving.name)
        # A replica that starts does not go on with traces of long ago.
        is_news = datetime.now(UTC) - serving.update_time.ToDatetime(UTC) < _NEWS
        with tracing.under(traceparent if is_news else ""):
            async with self._locks[project]:
                if self._standings.see(serving, project):  # decided elsewhere, and perhaps by a person
                    self._standings[project].refused -= {serving.wanted_sha256, serving.split.sha256}
                await self._converge(project, began)

    async def _policy_gone(self, project: str) -> None:
        """Lets a deleted project's versions go; streams that run on them finish."""
        async with self._locks[project]:
            if project in self._standings and await self._policies.find(project) is None:
                self._registry.flip(project, Route())
                self._standings.forget(project)

    async def _follow_bests(self) -> None:
        async for event in self._events.subscribe(BEST):
            if best := _announced(event):
                self._spawn(self._best_announced(event, best))

    async def _best_announced(self, event: Event, best: Best) -> None:
        with tracing.span(f"process {event.type}", SpanKind.CONSUMER, event.traceparent):
            await self._refresh(names.project_of(best.checkpoint), best)

    async def _reconcile_always(self) -> None:
        while True:
            await asyncio.sleep(self._reconcile)
            for project in self._standings:
                if self._standings[project].serving and not self._locks[project].locked():
                    await _logged(self._refresh(project))

    async def _refresh(self, project: str, announced: Best | None = None) -> None:
        """Asks again what is wanted, and converges to it."""
        began = time.monotonic()
        async with self._locks[project]:
            ready: Loaded | None = None
            try:
                serving = await self._policies.get(project)
                if serving.mode == SERVING_MODE_LATEST_BEST:
                    serving, ready = await self._bests.take(serving, project, await self._device, began, announced)
                await self._keep_what_serves(serving)
                if serving.etag:
                    self._standings.see(serving, project)
            except CodegraftError as error:  # the policy as it was last seen stands
                _log.warning("the policy cannot be refreshed", project=project, error=error.message)
            if self._standings[project].serving:
                await self._converge(project, began, ready)

    async def _keep_what_serves(self, serving: Serving) -> None:
        """Holds what the policy names, and asks again for what a person chose: the trainer may have been away then."""
        await self._holds.renew(named(serving))
        for chosen in (serving.pinned_checkpoint, serving.split.checkpoint):
            if chosen:
                await self._keep(chosen)

    async def _converge(self, project: str, began: float, ready: Loaded | None = None, patience: float = 0.0) -> None:
        """Swaps if need be. The caller holds the project's lock."""
        standing = self._standings[project]
        await self._swapper.swap(project, await self._device, began, ready=ready, patience=patience)
        if not standing.passing:
            if standing.failures:
                standing.failures, standing.failure = 0, None
                self._standings.notify(project)
            return
        if not standing.retrying:
            # A fresh context: the request that met the outage has a deadline of its own, which must not end the retry.
            delay, fresh = _RETRIES.delay(standing.failures), contextvars.Context()
            asyncio.get_running_loop().call_later(delay, self._try_again, project, context=fresh)
            standing.retrying = True
        standing.failures, standing.passing = standing.failures + 1, False

    def _place_freed(self) -> None:
        for project in self._standings:
            if self._standings[project].waits:
                self._standings[project].waits = False
                self._spawn(self._refresh(project))

    def _try_again(self, project: str) -> None:
        self._standings[project].retrying = False
        self._spawn(self._refresh(project))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        # Also when a call's end freed the place: its deadline must not end what others wait for.
        task = asyncio.get_running_loop().create_task(self._in_turn(work), context=without_deadline())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _in_turn(self, work: Coroutine[Any, Any, None]) -> None:
        async with self._at_once:
            await _logged(work)


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    """One project's trouble must not end the following of the others."""
    try:
        await work
    except Exception:
        _log.exception("following a policy failed")


def _announced(event: Event) -> Best | None:
    try:
        changed = event.unpack(BestCheckpointChanged)
        names.parse(names.CHECKPOINT, changed.checkpoint, field="checkpoint")
    except CodegraftError as error:
        _log.warning("an event is not readable", id=event.id, error=error.message)
        return None
    return Best(changed.checkpoint, changed.sha256, changed.base_model, changed.base_digest, changed.test_loss)
