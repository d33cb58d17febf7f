"""A run's story as it is told: events in order, the run's record beside them, and word to the other services."""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.message import Message

from codegraft.trainer.v1.run_event_pb2 import RunEvent
from codegraft.trainer.v1.run_pb2 import Run
from services.core import log
from services.core.errors import Unavailable
from services.core.events import EventBus
from services.core.jobs import JobContext
from services.trainer.records import Story

logger = log.get(__name__)


class Teller:
    """Tells the story of one attempt.

    Attributes:
        run: the run's record as it was last stored.
    """

    def __init__(self, story: Story, events: EventBus, context: JobContext[Run]) -> None:
        self._story = story
        self._events = events
        self._context = context
        self.run = context.job

    async def tell(self, event: RunEvent, change: Callable[[Run], None] | None = None) -> None:
        """Adds to the story, then counts it in the run's record, with what else changes there.

        Raises:
            LeaseLost, StateUnavailable: as JobContext.update.
        """
        event.sequence = self.run.last_sequence + 1
        event.time.GetCurrentTime()
        await self._story.write(self.run.name, event, self._context.epoch)

        def count(record: Run) -> None:
            record.last_sequence = event.sequence
            if change is not None:
                change(record)

        self.run = await self._context.update(count)

    async def note(self, text: str) -> None:
        """Tells a person something."""
        await self.tell(RunEvent(note=text))

    async def publish(self, event_type: str, payload: Message, what: str) -> None:
        """Events are a convenience for others: an outage of NATS does not stop a run.

        Args:
            what: tells the event from the run's others, also when another attempt publishes it again.
        """
        try:
            await self._events.publish(event_type, self.run.name, payload, id=f"{self.run.name}/{what}")
        except Unavailable as error:
            logger.warning("an event could not be published", run=self.run.name, error=error.message)
