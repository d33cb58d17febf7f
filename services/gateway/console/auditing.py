"""Records of the audit log, for tables: the newest first."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp

from codegraft.access.v1.audit_pb2 import AuditChange, AuditRecord
from services.client.aio.access import Audit

_PAGE = 1000
_TOLD = frozenset({"decided", "etag", "history", "update_time"})
"""Fields that tell nothing of a change: they differ with every one, or follow from others."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One call that changed something, or tried to."""

    time: Timestamp
    caller: str
    method: str
    resources: list[str]
    result: str
    changes: list[str]
    """What differs, one a line."""


async def newest(audit: Audit, project: str, back: timedelta, most: int) -> list[Entry]:
    """The newest records of a project ("-": of all).

    Raises:
        PermissionDenied: the caller is no operator of it.
    """
    kept: deque[AuditRecord] = deque(maxlen=most)
    async for record in audit.list(project, since=datetime.now(UTC) - back, page_size=_PAGE):
        kept.append(record)
    return [entry(record) for record in reversed(kept)]


def entry(record: AuditRecord) -> Entry:
    """As a row of a table."""
    return Entry(
        record.time,
        record.caller,
        record.method.rpartition("/")[2],
        list(record.resources) or [change.name for change in record.changes][:3],
        record.reason or record.code,
        [line for change in record.changes for line in difference(change)],
    )


def difference(change: AuditChange) -> list[str]:
    """The fields that differ: name, what was there before, what after."""
    before, after = MessageToDict(change.before), MessageToDict(change.after)
    names = sorted((before.keys() | after.keys()) - _TOLD)
    return [
        f"{change.name} {name}: {before.get(name, '-')} -> {after.get(name, '-')}"
        for name in names
        if before.get(name) != after.get(name)
    ]
