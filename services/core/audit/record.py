"""What one call changed, gathered while it is served, and made into a record without secrets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from codegraft.access.v1.audit_pb2 import AuditRecord

MOST_BYTES = 256 << 10
"""A larger record goes without contents: NATS takes messages of 1 MiB."""


@dataclass(frozen=True, slots=True)
class Change:
    """One stored record before and after."""

    name: str
    before: Message | None
    after: Message | None


_changes: ContextVar[list[Change] | None] = ContextVar("changes", default=None)


@contextlib.contextmanager
def gathering() -> Iterator[list[Change]]:
    """The changes that are noted within the block, also by tasks that are started in it and end before it."""
    changes: list[Change] = []
    token = _changes.set(changes)
    try:
        yield changes
    finally:
        _changes.reset(token)


def note(name: str, before: Message | None, after: Message | None) -> None:
    """Notes what a write changed; nothing outside of a call."""
    changes = _changes.get()
    if changes is not None:
        changes.append(Change(name, before, after))


def fill(record: AuditRecord, changes: Sequence[Change]) -> AuditRecord:
    """The record with the changes, as far as they have room in it."""
    for change in changes:
        added = record.changes.add(name=change.name)
        if change.before is not None:
            added.before.update(_plain(change.before))
        if change.after is not None:
            added.after.update(_plain(change.after))
    if record.ByteSize() > MOST_BYTES:
        record.shortened = True
        for added in record.changes:
            added.ClearField("before")
            added.ClearField("after")
        del record.changes[1000:]
    return record


def _plain(message: Message) -> dict[str, Any]:
    """The message as JSON has it, without bytes: those are secrets, sealed or hashed."""
    copy = type(message)()
    copy.CopyFrom(message)
    _drop_bytes(copy)
    return MessageToDict(copy, preserving_proto_field_name=True)


def _drop_bytes(message: Message) -> None:
    for field, value in message.ListFields():
        if field.type == field.TYPE_BYTES:
            message.ClearField(field.name)
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for each in value if field.is_repeated else [value]:
                _drop_bytes(each)
