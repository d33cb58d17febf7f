"""Brings this replica to what every project's policy wants, and keeps it there.

The policy with what it resolves to is durable (policy.py), so a cold replica starts on it without any event. Events of
the trainer make a new best known at once; a reconcile asks the trainer again every so often, so that a lost or repeated
event changes nothing. A new best is fetched, verified and staged first; only then the policy resolves to it and the
alias is flipped. Whatever is wrong with it, the version before goes on serving, also on replicas that start later.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import timedelta

from google.protobuf.message import Message

from codegraft.common.v1.job_pb2 import Failure
from codegraft.event.v1.events_pb2 import AdapterRejected as RejectedEvent
from codegraft.event.v1.events_pb2 import AdapterSwapped, BestCheckpointChanged, ServingChanged
from codegraft.inference.v1.serving_pb2 import (
    SERVING_MODE_LATEST_BEST,
    SERVING_MODE_OFF,
    SERVING_MODE_PINNED,
    Serving,
    ServingMode,
)
from services.core import log, names
from services.core.backoff import Backoff
from services.core.errors import BaseModelMismatch, CodegraftError
from services.core.events import EventBus
from services.core.state import Table
from services.inference.adapters.loader import Device, Loader
from services.inference.adapters.registry import Registry, Version
from services.inference.policy import Best, BestSource, Policies, follow_best, set_mode, want

BEST = "codegraft.trainer.checkpoint.best.v1"
CHANGED = "codegraft.inference.serving.changed.v1"
SWAPPED = "codegraft.inference.adapter.swapped.v1"
REJECTED = "codegraft.inference.adapter.rejected.v1"

_RETRIES = Backoff(first=timedelta(milliseconds=500), longest=timedelta(seconds=20))
_log = log.get("inference.follower")


@dataclass(slots=True)
class Standing:
    """How this replica stands to one project's policy."""

    serving: Serving | None = None
    """The newest policy seen; None while none is known."""
    tried: bool = False
    """Whether it was brought to the policy once: completions wait for that."""
    failure: Failure | None = None
    """Why the newest wanted version was refused."""
    refused: str = ""
    """SHA-256 of that version: not tried again."""
    failures: int = 0
    """Passing failures in a row (the store, say)."""
    swap_seconds: float = 0.0
    """Duration of the last swap, from noticing to serving."""


class Follower:
    """See the module. All methods belong to one event loop.

    Args:
        table: the policies.
        replica: this replica's name in events.
        reconcile: seconds between two questions to the trainer, and the most a lost event can cost.
    """

    def __init__(
        self,
        *,
        table: Table[Serving],
        events: EventBus,
        loader: Loader,
        registry: Registry,
        bests: BestSource,
        replica: str,
        reconcile: float,
    ) -> None:
        self._table, self._policies = table, Policies(table)
        self._events, self._loader, self._registry, self._bests = events, loader, registry, bests
        self._replica, self._reconcile = replica, reconcile
        self._device: asyncio.Future[Device] = asyncio.get_running_loop().create_future()
        self._standing: defaultdict[str, Standing] = defaultdict(Standing)
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._watchers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._retries: set[asyncio.Task[None]] = set()

    def model_loaded(self, device: Device) -> None:
        """Adapters can be staged from now on."""
        if not self._device.done():
            self._device.set_result(device)

    def standing(self, project: str) -> Standing:
        """How this replica stands to a project's policy."""
        return self._standing[project]

    async def run(self) -> None:
        """Follows policies and events until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_policies())
            group.create_task(self._follow_bests())
            group.create_task(self._reconcile_always())

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

    async def ensure(self, project: str) -> None:
        """Brings a project that nobody asked for yet to its policy; later calls return at once.

        A project without a policy gets its first one here, so that every replica follows it from now on.

        Raises:
            Unavailable: the state store does not answer.
        """
        standing = self._standing[project]
        if standing.tried:
            return
        async with self._locks[project]:
            if standing.tried:
                return
            if (serving := await self._policies.find(project)) is None:
                best = await self._verified_best(project)
                serving = await self._policies.change(project, lambda s: follow_best(s, best[0]) if best else None)
            self._see(project, serving)
            await self._converge(project, time.monotonic())

    async def set_policy(self, project: str, mode: ServingMode, checkpoint: str, etag: str) -> Serving:
        """Sets a project's policy, and brings this replica to it as far as that can be done now.

        Raises:
            CheckpointNotFound, BaseModelMismatch: PINNED to a checkpoint that is not there or does not fit.
            EtagMismatch: the policy is not at that etag.
        """
        began = time.monotonic()
        if mode == SERVING_MODE_PINNED:
            await self._keep(checkpoint)
        manifest = await self._loader.manifest(checkpoint) if mode == SERVING_MODE_PINNED else None
        if manifest and self._device.done() and manifest.base_digest != self._device.result().base.digest:
            raise BaseModelMismatch(
                f"{checkpoint} was trained on {manifest.base_model} with other weights than those served",
                field="checkpoint",
                hint="Pin a checkpoint of the served base model.",
            )
        async with self._locks[project]:
            # Resolved before the one write, so that no replica ever falls back to the base model in between.
            best = await self._verified_best(project) if mode == SERVING_MODE_LATEST_BEST else None

            def change(serving: Serving) -> None:
                was = serving.mode
                set_mode(serving, mode, checkpoint)
                if manifest:
                    loss = manifest.test_loss if manifest.HasField("test_loss") else None
                    want(serving, manifest.name, manifest.sha256, loss)
                elif best:
                    want(serving, best[0].checkpoint, best[0].sha256, best[0].test_loss)
                elif was != SERVING_MODE_LATEST_BEST:
                    want(serving, "", "")

            serving = await self._policies.change(project, change, etag=etag)
            self._standing[project].refused, self._standing[project].failure = "", None
            self._see(project, serving)
            mode_name = ServingMode.Name(mode).removeprefix("SERVING_MODE_")
            changed = ServingChanged(serving=serving.name, mode=mode_name)
            await self._tell(CHANGED, serving.name, changed, f"{serving.name}@{serving.etag}")
            if self._device.done():
                await self._converge(project, began, best[1] if best else None)
        return serving

    async def _follow_policies(self) -> None:
        await self._device
        async for serving in self._table.watch_all():
            began, project = time.monotonic(), names.project_of(serving.name)
            async with self._locks[project]:
                if self._see(project, serving) or not self._standing[project].tried:
                    await self._converge(project, began)

    async def _follow_bests(self) -> None:
        await self._device
        async for event in self._events.subscribe(BEST):
            began = time.monotonic()
            try:
                changed = event.unpack(BestCheckpointChanged)
                names.parse(names.CHECKPOINT, changed.checkpoint, field="checkpoint")
            except CodegraftError as error:
                _log.warning("an event is not readable", id=event.id, error=error.message)
                continue
            project = names.project_of(changed.checkpoint)
            announced = Best(
                changed.checkpoint, changed.sha256, changed.base_model, changed.base_digest, changed.test_loss
            )
            await self._take_best(project, began, announced)

    async def _reconcile_always(self) -> None:
        await self._device
        while True:
            await asyncio.sleep(self._reconcile)
            for project, standing in list(self._standing.items()):
                if standing.serving:
                    await self._refresh(project)

    async def _refresh(self, project: str) -> None:
        """Asks again what is wanted, and converges to it."""
        serving, began = self._standing[project].serving, time.monotonic()
        if serving is None or serving.mode == SERVING_MODE_LATEST_BEST:
            await self._take_best(project, began)
        else:
            if serving.mode == SERVING_MODE_PINNED:
                await self._keep(serving.pinned_checkpoint)  # the trainer may have been away when it was pinned
            async with self._locks[project]:
                await self._converge(project, began)

    async def _keep(self, checkpoint: str) -> None:
        """Asks the trainer not to delete what is pinned. Without it pinning works all the same: it may be the way out
        of an outage."""
        try:
            await self._bests.keep(checkpoint)
        except CodegraftError as error:
            _log.warning("the trainer does not keep a pinned checkpoint", checkpoint=checkpoint, error=error.message)

    async def _take_best(self, project: str, began: float, announced: Best | None = None) -> None:
        """Makes the best checkpoint the wanted one, once it is verified; outages leave it to the next reconcile."""
        async with self._locks[project]:
            try:
                serving = await self._policies.get(project)
                if serving.mode != SERVING_MODE_LATEST_BEST:
                    return
                best = await self._verified_best(project, announced, but=serving.wanted_sha256)
                if best:
                    serving = await self._policies.change(project, lambda s: follow_best(s, best[0]))
                if serving.etag:
                    self._see(project, serving)
                    await self._converge(project, began, best[1] if best else None)
            except CodegraftError as error:
                _log.warning("the best checkpoint could not be taken over", project=project, error=error.message)

    async def _verified_best(
        self, project: str, announced: Best | None = None, but: str = ""
    ) -> tuple[Best, Version] | None:
        """The project's best checkpoint, staged; None when there is none, it is refused or it is the one in ``but``."""
        if not self._device.done():
            return None
        device = self._device.result()
        try:
            best = await self._bests.best(project, device.base.model) or announced
        except CodegraftError as error:
            _log.warning("the trainer does not say what is best", project=project, error=error.message)
            best = announced
        if best is None or best.base_model != device.base.model or best.sha256 == but:
            return None
        if best.sha256 == self._standing[project].refused:
            return None
        try:
            return best, await self._loader.load(best.checkpoint, device, sha256=best.sha256)
        except CodegraftError as error:
            await self._refuse(project, best.checkpoint, best.sha256, error)
            return None

    async def _converge(self, project: str, began: float, ready: Version | None = None) -> None:
        """Flips to the wanted version, if it is another one and verifies. The caller holds the project's lock."""
        standing, device = self._standing[project], await self._device
        serving = standing.serving or Serving()
        wanted = "" if serving.mode == SERVING_MODE_OFF else serving.wanted_sha256
        active = self._registry.active(project)
        before = active.sha256 if active else ""
        if wanted == before or wanted == standing.refused != "":
            standing.tried = True
            return
        version: Version | None = None
        try:
            if wanted:
                known = ready if ready and ready.sha256 == wanted else None
                version = known or await self._loader.load(serving.wanted_checkpoint, device, sha256=wanted)
        except CodegraftError as error:
            await self._refuse(project, serving.wanted_checkpoint, wanted, error)
            return
        finally:
            standing.tried = True
        self._registry.flip(project, version)
        standing.failure, standing.refused, standing.failures = None, "", 0
        standing.swap_seconds = time.monotonic() - began
        checkpoint = version.checkpoint if version else ""
        _log.info("swapped", project=project, checkpoint=checkpoint, seconds=round(standing.swap_seconds, 4))
        self._notify(project)
        swapped = AdapterSwapped(
            serving=f"{project}/serving",
            replica=self._replica,
            from_sha256=before,
            to_sha256=wanted,
            checkpoint=checkpoint,
            seconds=standing.swap_seconds,
        )
        await self._tell(SWAPPED, swapped.serving, swapped, uuid.uuid4().hex)

    async def _refuse(self, project: str, checkpoint: str, sha256: str, error: CodegraftError) -> None:
        """Notes why a version does not serve. One that can never serve is not tried again; an outage passes."""
        standing = self._standing[project]
        standing.failure = Failure(reason=error.reason, message=error.message, hint=error.hint)
        _log.warning("adapter refused", project=project, checkpoint=checkpoint, reason=error.reason, why=error.message)
        self._notify(project)
        if not error.is_callers_fault:
            # A fresh context: the request that met the outage has a deadline of its own, which must not end the retry.
            delay, fresh = _RETRIES.delay(standing.failures), contextvars.Context()
            asyncio.get_running_loop().call_later(delay, self._try_again, project, context=fresh)
            standing.failures += 1
            return
        standing.refused = sha256
        rejected = RejectedEvent(
            serving=f"{project}/serving",
            replica=self._replica,
            checkpoint=checkpoint,
            reason=error.reason,
            message=error.message,
        )
        await self._tell(REJECTED, rejected.serving, rejected, uuid.uuid4().hex)

    def _try_again(self, project: str) -> None:
        task = asyncio.ensure_future(self._refresh(project))
        self._retries.add(task)
        task.add_done_callback(self._retries.discard)

    def _see(self, project: str, serving: Serving) -> bool:
        """Notes a policy unless a newer one is known; whether it was news."""
        standing = self._standing[project]
        if standing.serving is not None and int(standing.serving.etag or 0) >= int(serving.etag or 0):
            return False
        standing.serving = serving
        self._notify(project)
        return True

    def _notify(self, project: str) -> None:
        for watcher in self._watchers[project]:
            watcher.set()

    async def _tell(self, type: str, subject: str, data: Message, id: str) -> None:
        """Publishes an event; without NATS serving goes on all the same."""
        try:
            await self._events.publish(type, subject, data, id=id)
        except CodegraftError as error:
            _log.warning("event not published", type=type, subject=subject, error=error.message)
