"""Typed resources over a state store: protobuf records with etags, pages and compare-and-set changes."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar, cast

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from services.core.audit import record as audit
from services.core.backoff import Backoff
from services.core.errors import (
    Aborted,
    CodegraftError,
    EtagMismatch,
    InvalidPageSize,
    InvalidPageToken,
    RevisionMismatch,
)
from services.core.state.store import Entry, StateStore

DEFAULT_PAGE = 50
LARGEST_PAGE = 1000
_TRIES = 50
"""Lost compare-and-sets after which a change gives up: far more than writers that meet on one record."""
_WAITS = Backoff(first=timedelta(milliseconds=2), longest=timedelta(milliseconds=100))

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Change(Generic[M]):
    """A record as it came to be."""

    name: str
    message: M | None
    """None once it was deleted."""
    traceparent: str
    """W3C trace context of what wrote it."""


class Table(Generic[M]):
    """All records of one message type in a bucket.

    Keys are ``<message name>/<resource name>``, so that tables of several types share a bucket without meeting. The
    etag is the KV revision; it is filled on reading and not stored. Prefixes are resource names, whole segments.

    Args:
        message_type: has the string fields ``name`` and ``etag``.
        missing: raised for a name that is not there.

    Every method may raise StateUnavailable.
    """

    def __init__(self, store: StateStore, message_type: type[M], *, missing: type[CodegraftError]) -> None:
        self._store = store
        self._type = message_type
        self._missing = missing
        self._root = message_type.DESCRIPTOR.name + "/"

    async def get(self, name: str) -> M:
        """The record of that name.

        Raises:
            the class given as ``missing``: there is none.
        """
        return self._message(await self._entry(name))

    async def find(self, name: str) -> M | None:
        """The record of that name, or None."""
        entry = await self._store.get(self._root + name)
        return self._message(entry) if entry is not None else None

    async def create(self, message: M) -> M:
        """Stores a new record; returns it with its etag.

        Raises:
            ResourceExists: there is one of that name.
        """
        name = cast(Any, message).name
        revision = await self._store.create(self._root + name, _stored(message))
        audit.note(name, None, message)
        return self._message(Entry(self._root + name, _stored(message), revision))

    async def mutate(self, name: str, change: Callable[[M], None], *, etag: str = "") -> M:
        """Changes a record where no other writer comes between reading and writing; returns it as stored.

        Args:
            change: changes the message it is given, from nothing but that message: it runs anew on the newer record
                when another writer was faster. What it raises ends the attempt. When it changes nothing, nothing is
                written.
            etag: the etag that the record must still have; empty for any.

        Raises:
            the class given as ``missing``: there is no such record.
            EtagMismatch: the record has another etag.
            Aborted: other writers were faster every time.
        """
        for attempt in range(_TRIES):
            entry = await self._entry(name)
            _check_etag(name, entry, etag)
            message = self._message(entry)
            change(message)
            value = _stored(message)
            if value == _stored(self._message(entry)):
                return message
            try:
                revision = await self._store.update(self._root + name, value, entry.revision)
            except RevisionMismatch:
                await asyncio.sleep(_WAITS.delay(attempt))
                continue
            stored = self._message(Entry(entry.key, value, revision))
            audit.note(name, self._message(entry), stored)
            return stored
        raise Aborted(f"{name} is changed by too many writers at once", hint="Try again.", retry_after=1.0)

    async def delete(self, name: str, *, etag: str = "") -> None:
        """Deletes a record.

        Raises:
            the class given as ``missing``: there is no such record.
            EtagMismatch: the record has another etag, or was changed while it was being deleted.
        """
        entry = await self._entry(name)
        _check_etag(name, entry, etag)
        try:
            await self._store.delete(entry.key, entry.revision)
        except RevisionMismatch:
            raise _changed(name) from None
        audit.note(name, self._message(entry), None)

    async def page(
        self,
        parent: str,
        page_size: int,
        page_token: str,
        *,
        newest_first: bool = False,
        where: Callable[[M], bool] = lambda message: True,
    ) -> tuple[list[M], str]:
        """One page of the records under ``parent``, and the token of the next page (empty at the end).

        A token names the last record given out, not a position: records that come or go meanwhile shift nothing.

        Args:
            parent: a resource name (``projects/p``); empty for all records.
            page_size: 0 means 50; more than 1,000 means 1,000.
            page_token: empty for the first page.
            newest_first: by ``create_time`` (the message's own or its status's), newest first; else by name.
            where: chooses the records that the caller may see.

        Raises:
            InvalidPageSize: below zero.
            InvalidPageToken: not given out by this list.
        """
        if page_size < 0:
            raise InvalidPageSize(
                f"page_size is {page_size}", field="page_size", hint="Use 0 for the default or a positive number."
            )
        size = min(page_size or DEFAULT_PAGE, LARGEST_PAGE)
        scope = f"{self._root}{parent}{'|newest' if newest_first else ''}"
        last = _parse_token(page_token, scope) if page_token else None

        def place(message: M) -> tuple[int, str]:
            return (-_created(message) if newest_first else 0, cast(Any, message).name)

        messages = sorted(await self.all(parent.rstrip("/") + "/" if parent else ""), key=place)
        rest = [message for message in messages if where(message) and (last is None or place(message) > last)]
        page = rest[:size]
        return page, _token(scope, place(page[-1])) if len(rest) > size else ""

    async def all(self, prefix: str = "") -> list[M]:
        """Every record under the prefix, sorted by name."""
        return [self._message(entry) for entry in await self._store.list(self._root + prefix)]

    async def names(self, prefix: str = "") -> list[str]:
        """The names of the records under the prefix, sorted; the records themselves are not read."""
        return [key.removeprefix(self._root) for key in await self._store.keys(self._root + prefix)]

    async def watch(self, name: str) -> AsyncIterator[M]:
        """The record, then each newer state of it; ends when it is deleted. Quick changes may be joined.

        Raises:
            the class given as ``missing``: there is no such record at the start.
        """
        key = self._root + name
        await self._entry(name)
        async for entry in self._store.watch(key):
            if entry.key != key:
                continue
            if entry.value is None:
                return
            yield self._message(entry)

    async def follow(self, prefix: str = "") -> AsyncIterator[Change[M]]:
        """Every record under the prefix, then each newer state of any of them and each deletion, without end."""
        async for entry in self._store.watch(self._root + prefix):
            message = self._message(entry) if entry.value is not None else None
            yield Change(entry.key.removeprefix(self._root), message, entry.traceparent)

    async def _entry(self, name: str) -> Entry:
        entry = await self._store.get(self._root + name)
        if entry is None:
            raise self._missing(f"{name} does not exist", field="name", hint="Check the name.", name=name)
        return entry

    def _message(self, entry: Entry) -> M:
        message = self._type.FromString(entry.value or b"")
        cast(Any, message).etag = str(entry.revision)
        return message


def _stored(message: Message) -> bytes:
    """The message without its etag, in the same bytes for the same content."""
    copy = type(message)()
    copy.CopyFrom(message)
    copy.ClearField("etag")
    return copy.SerializeToString(deterministic=True)


def _check_etag(name: str, entry: Entry, etag: str) -> None:
    if etag and etag != str(entry.revision):
        raise _changed(name)


def _changed(name: str) -> EtagMismatch:
    return EtagMismatch(f"{name} was changed meanwhile", field="etag", hint="Read it again and repeat the change.")


def _created(message: Message) -> int:
    """Nanoseconds since 1970 of ``create_time`` or ``status.create_time``; 0 for a message that has neither."""
    holder: Any = message
    if "create_time" not in message.DESCRIPTOR.fields_by_name and "status" in message.DESCRIPTOR.fields_by_name:
        holder = holder.status
    time = getattr(holder, "create_time", None)
    return time.ToNanoseconds() if isinstance(time, Timestamp) else 0


def _token(scope: str, place: tuple[int, str]) -> str:
    return base64.urlsafe_b64encode(json.dumps([scope, *place]).encode()).decode().rstrip("=")


def _parse_token(token: str, scope: str) -> tuple[int, str]:
    try:
        padded = token + "=" * (-len(token) % 4)
        match json.loads(base64.b64decode(padded.encode("ascii"), altchars=b"-_", validate=True)):
            case [str(given), int(order), str(name)] if given == scope:
                return order, name
    except (UnicodeError, binascii.Error, json.JSONDecodeError, RecursionError):
        pass
    raise InvalidPageToken(
        "page_token was not given out by this list",
        field="page_token",
        hint="Pass the next_page_token of the page before with the same parent, or none.",
    )
