"""The events that inference publishes about serving."""

from __future__ import annotations

import uuid

from codegraft.event.v1.events_pb2 import AdapterRejected, AdapterSwapped, AdapterWaiting, ServingChanged, SwapPhases
from codegraft.inference.v1.serving_pb2 import Serving, ServingMode
from services.core import log
from services.core.errors import CodegraftError
from services.core.events import EventBus
from services.inference.adapters.route import Route

CHANGED = "codegraft.inference.serving.changed.v1"
SWAPPED = "codegraft.inference.adapter.swapped.v1"
REJECTED = "codegraft.inference.adapter.rejected.v1"
WAITING = "codegraft.inference.adapter.waiting.v1"
_Data = ServingChanged | AdapterSwapped | AdapterRejected | AdapterWaiting
_log = log.get("inference.news")


class News:
    """Tells what happened. Without NATS it only logs, and serving goes on all the same.

    Args:
        replica: this replica's name.
    """

    def __init__(self, events: EventBus, replica: str) -> None:
        self._events, self._replica = events, replica

    async def changed(self, serving: Serving) -> None:
        """A person set a policy."""
        mode = ServingMode.Name(serving.mode).removeprefix("SERVING_MODE_")
        await self._tell(CHANGED, ServingChanged(serving=serving.name, mode=mode), f"{serving.name}@{serving.etag}")

    async def waiting(self, serving: Serving) -> None:
        """A best checkpoint waits for a person's word. Every replica says so, and it is one event."""
        data = AdapterWaiting(
            serving=serving.name,
            checkpoint=serving.waiting_checkpoint,
            sha256=serving.waiting_sha256,
            test_loss=serving.waiting_test_loss,
            wanted_checkpoint=serving.wanted_checkpoint,
            wanted_test_loss=serving.wanted_test_loss,
        )
        await self._tell(WAITING, data, f"{serving.name}@{serving.etag}/waiting")

    async def swapped(self, project: str, before: Route, now: Route, phases: SwapPhases, seconds: float) -> None:
        """This replica serves another version now."""
        data = AdapterSwapped(
            serving=f"{project}/serving",
            replica=self._replica,
            from_sha256=before.main.sha256 if before.main else "",
            to_sha256=now.main.sha256 if now.main else "",
            checkpoint=now.main.checkpoint if now.main else "",
            split_sha256=now.second.sha256 if now.second else "",
            split_percent=now.percent,
            phases=phases,
            seconds=seconds,
        )
        await self._tell(SWAPPED, data, uuid.uuid4().hex)

    async def rejected(
        self, project: str, checkpoint: str, sha256: str, error: CodegraftError, now: Route, seconds: float
    ) -> None:
        """This replica refused a version and serves on what it had."""
        data = AdapterRejected(
            serving=f"{project}/serving",
            replica=self._replica,
            checkpoint=checkpoint,
            sha256=sha256,
            reason=error.reason,
            message=error.message,
            active_sha256=now.main.sha256 if now.main else "",
            seconds=seconds,
        )
        await self._tell(REJECTED, data, uuid.uuid4().hex)

    async def _tell(self, type: str, data: _Data, id: str) -> None:
        try:
            await self._events.publish(type, data.serving, data, id=id)
        except CodegraftError as error:
            _log.warning("event not published", type=type, subject=data.serving, error=error.message)
