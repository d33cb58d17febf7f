"""What an event is, and what an event bus promises. The fake and the NATS stream both keep to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from services.core.errors import InvalidArgument

PREFIX = "codegraft."
"""Every event type begins so: ``codegraft.<service>.<thing>.<happened>.v1``."""

M = TypeVar("M", bound=Message)
MessageType = type[M]  # within Event, `type` is the field


@dataclass(frozen=True, slots=True)
class Event:
    """One CloudEvent."""

    id: str
    """Unique among all events; a second event of the same id is the same event."""
    type: str
    """What happened, which is also its NATS subject."""
    source: str
    """The service that says so."""
    subject: str
    """Name of the resource it happened to."""
    time: datetime
    """When, in UTC."""
    data: bytes
    """A serialised message of codegraft.event.v1."""
    request_id: str = ""
    """The request that led to it."""
    traceparent: str = ""
    """W3C trace context of that request."""

    def unpack(self, message_type: MessageType[M]) -> M:
        """The data as a message of that type.

        Raises:
            InvalidArgument: it is no such message.
        """
        try:
            return message_type.FromString(self.data)
        except DecodeError as error:
            raise InvalidArgument(f"event {self.id} holds no {message_type.DESCRIPTOR.full_name}") from error


class EventBus(Protocol):
    """One stream of events."""

    async def publish(self, type: str, subject: str, data: Message, *, id: str) -> None:
        """Publishes an event; the request id and trace context come from the running request.

        Args:
            id: made from what happened (``<resource name>@<etag>``), so that a repeated publication is dropped.

        Raises:
            StateUnavailable: the server does not answer.
        """
        ...

    def subscribe(self, *types: str, durable: str = "") -> AsyncIterator[Event]:
        """Events of the types (all when none is named), oldest first and without end.

        Asking for the next event acknowledges the one before.

        Args:
            durable: name under which the server remembers what was acknowledged: subscribers of one name share the
                events, and the first starts with the oldest that is kept. Empty: every event from the moment on in
                which the first is asked for.

        Raises:
            StateUnavailable: only once the connection is closed for good; outages are waited for.
        """
        ...


def check_type(type: str) -> str:
    """The type, when it is a valid one.

    Raises:
        InvalidArgument: it is not below ``codegraft.``.
    """
    if not type.startswith(PREFIX) or not all(part.isidentifier() for part in type.split(".")):
        raise InvalidArgument(f"{type!r} is no event type", field="type", hint="Use codegraft.<service>.<what>.v1.")
    return type
