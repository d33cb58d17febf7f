"""What one call changed, gathered while it is served, and made into a record without secrets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
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


@dataclass(slots=True)
class Gathered:
    """What is known of a call once it is served."""

    changes: list[Change] = field(default_factory=list)
    resources: list[str] = field(default_factory=list)
    """What the handler says that it is about, where the request alone does not tell."""
    projects: list[str] = field(default_factory=list)
    """Whose that is."""


_gathered: ContextVar[Gathered | None] = ContextVar("gathered", default=None)


@contextlib.contextmanager
def gathering() -> Iterator[Gathered]:
    """What is noted within the block, also by tasks that are started in it and end before it."""
    gathered = Gathered()
    token = _gathered.set(gathered)
    try:
        yield gathered
    finally:
        _gathered.reset(token)


def note(name: str, before: Message | None, after: Message | None) -> None:
    """Notes what a write changed; nothing outside of a call."""
    gathered = _gathered.get()
    if gathered is not None:
        gathered.changes.append(Change(name, before, after))


def about(name: str, projects: Iterable[str] = ()) -> None:
    """Notes what a call is about, and whose that is, where no field of the request names a project.

    Args:
        projects: all of them have to be a reader's for him to see the record; none: it is for those of all projects.
    """
    gathered = _gathered.get()
    if gathered is not None:
        gathered.resources = [name]
        gathered.projects = sorted(set(projects))


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
    for part, value in message.ListFields():
        if part.type == part.TYPE_BYTES:
            message.ClearField(part.name)
        elif part.message_type is not None and not part.message_type.GetOptions().map_entry:
            for each in value if part.is_repeated else [value]:
                _drop_bytes(each)
