"""Copies of records in the object store, for the day on which NATS has lost them: `codegraft rebuild` reads them.

The record is the truth and is written first; its copy follows by itself, mostly within milliseconds. No call waits for
it, so none fails because the store is away: what is due is copied once the store is back. Every replica copies, and
looks at all records when it starts, so that what a killed one left out is made up for.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Generic, TypeVar, cast

from google.protobuf import json_format
from google.protobuf.message import Message

from services.core import log
from services.core.backoff import Backoff
from services.core.errors import ObjectNotFound, Unavailable
from services.core.state.table import Table
from services.core.store.store import ObjectStore

ROOT = "records/"
"""Before the keys of all copies. They are no artifacts: they change with their records."""
GONE = b"{}\n"
"""Copy of a record that was deleted, where that has to be known for ever."""
_WAITS = Backoff(first=timedelta(seconds=1), longest=timedelta(minutes=1))

M = TypeVar("M", bound=Message)
logger = log.get(__name__)


def prefix(bucket: str, message_type: type[Message]) -> str:
    """Before the keys of the copies of one type; behind it comes the record's name."""
    return f"{ROOT}{bucket}/{message_type.DESCRIPTOR.name}/"


class Mirror(Generic[M]):
    """Keeps the copies of all records of one type. Deleting a record deletes its copy.

    A record that is missing without having been deleted was lost, and then its copy is what is left of it: it stays.

    Args:
        bucket: of the records.
        message_type: of the records.
        table: the records.
        store: where the copies go, by their names.
        fields: what is copied of a record. Only what is named: a new field may hold a secret, or change all the time.
        precedes: whether a copy is worth more than the other record that has come in its place; then it stays.
        remembers: whether a deletion is kept on record (:data:`GONE`) instead of the copy.
    """

    def __init__(
        self,
        bucket: str,
        message_type: type[M],
        table: Table[M],
        store: ObjectStore,
        *,
        fields: Sequence[str],
        precedes: Callable[[M, M], bool] = lambda there, record: False,
        remembers: bool = False,
    ) -> None:
        self._prefix, self._type = prefix(bucket, message_type), message_type
        self._table, self._store = table, store
        self._fields, self._precedes, self._remembers = frozenset(fields), precedes, remembers
        self._due: dict[str, bool] = {}
        """Names of the records that changed, the longest waiting first, and whether they were deleted."""
        self._news = asyncio.Event()
        self._done: dict[str, bytes] = {}
        """Digests of the copies that this process has seen in the store."""

    async def run(self) -> None:
        """Copies whatever changes until cancelled; at first all that is there."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            group.create_task(self._copy_what_is_due())

    async def _follow(self) -> None:
        async for change in self._table.follow():
            gone = change.message is None
            # Most changes are of what is not copied, such as how far a fetch is.
            if change.message is None or self._done.get(change.name) != _digest(self._text(change.message)):
                self._due[change.name] = gone
                self._news.set()

    async def _copy_what_is_due(self) -> None:
        failures = 0
        while True:
            await self._news.wait()
            self._news.clear()
            while self._due:
                name = next(iter(self._due))
                gone = self._due.pop(name)
                try:
                    await self._copy(name, gone=gone)
                    failures = 0
                except Unavailable as error:
                    self._due.setdefault(name, gone)
                    logger.warning("a record cannot be copied to the store", name=name, error=error.message)
                    await asyncio.sleep(_WAITS.delay(failures))
                    failures += 1

    async def _copy(self, name: str, *, gone: bool) -> None:
        """Brings one copy to where its record is.

        Another replica does the same, and a slow one may write what was true a moment ago. It hears of what came after,
        as everybody does, and then writes again what is true.
        """
        self._done.pop(name, None)  # so that whatever comes from now on is looked at
        record, there = await self._table.find(name), await self._there(name)
        if record is not None:
            text = self._text(record)
            if there != text and not (there and self._precedes(self._parsed(there), record)):
                await self._store.put(self._key(name), text)
            self._done[name] = _digest(text)
        elif gone and self._remembers and there != GONE:
            await self._store.put(self._key(name), GONE)
        elif gone and not self._remembers and there is not None:
            await self._store.delete(self._key(name))

    async def _there(self, name: str) -> bytes | None:
        try:
            return await self._store.get(self._key(name))
        except ObjectNotFound:
            return None

    def _key(self, name: str) -> str:
        return f"{self._prefix}{name}.json"

    def _text(self, record: M) -> bytes:
        kept = self._type()
        kept.CopyFrom(record)
        for field, _ in record.ListFields():
            if field.name not in self._fields:
                kept.ClearField(cast(Any, field.name))
        # Readable field names, sorted keys: the same record is the same bytes.
        return json_format.MessageToJson(kept, preserving_proto_field_name=True, sort_keys=True).encode()

    def _parsed(self, text: bytes) -> M:
        try:
            return json_format.Parse(text, self._type(), ignore_unknown_fields=True)
        except (json_format.ParseError, UnicodeDecodeError):  # damaged: anything is worth more
            return self._type()


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()
