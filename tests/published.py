"""Holds events that services really published against docs/events.yaml's catalogue."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from google.protobuf.unknown_fields import UnknownFieldSet

import codegraft.event.v1.events_pb2 as pb
from services.core.events import Event, MemoryBus
from tools import event_catalogue


@cache
def _types() -> dict[str, event_catalogue.Event]:
    return {event.type: event for event in event_catalogue.catalogue()}


def check(service: str, buses: Iterable[Any]) -> None:
    """Every event of the service on buses in memory is of a known type, with its subject, id and payload."""
    for bus in buses:
        for event in bus.published if isinstance(bus, MemoryBus) else ():
            if event.type.split(".")[1] == service:  # tests play the others
                check_event(event)


def check_event(event: Event) -> None:
    told = _types()[event.type]
    assert re.fullmatch(told.subject_pattern, event.subject), f"{event.type}: {told.subject} is not {event.subject}"
    assert re.fullmatch(told.id_pattern, event.id), f"{event.type}: none of {told.ids} is {event.id}"
    payload = event.unpack(getattr(pb, told.short))
    assert not UnknownFieldSet(payload), f"{event.type} holds another message than {told.message}"  # type: ignore[no-untyped-call]
    first = payload.DESCRIPTOR.fields[0].name  # what it is about, or something of that
    assert str(getattr(payload, first)).startswith(event.subject), f"{event.type}: {first} is not of {event.subject}"
