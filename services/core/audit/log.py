"""What an audit log is, and the one in memory."""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

from codegraft.access.v1.audit_pb2 import AuditRecord
from services.core import pages


class AuditLog(Protocol):
    """Takes records and gives them back; nobody changes one. Methods raise StateUnavailable."""

    async def append(self, record: AuditRecord) -> None:
        """Stores the record; its sequence is given here."""
        ...

    async def page(
        self,
        project: str,
        page_size: int,
        page_token: str,
        since: datetime | None = None,
        within: frozenset[str] | None = None,
    ) -> tuple[list[AuditRecord], str]:
        """Records, oldest first, and the token of the next page (empty at the end).

        Args:
            project: ``projects/p``; empty for all.
            page_size: 0 means 50; more than 1,000 means 1,000.
            since: leaves out what is older.
            within: the reader's projects; None for all. Records of several projects are for readers of all of those.

        Raises:
            InvalidPageSize: below zero.
            InvalidPageToken: not given out for this list.
        """
        ...


def is_for(record: AuditRecord, project: str, within: frozenset[str] | None) -> bool:
    """Whether a record is of the project (empty: of any), and for a reader of these projects (None: of all)."""
    if project and project not in (record.project, *record.projects):
        return False
    return within is None or within.issuperset(record.projects)


class MemoryAudit:
    """See :class:`AuditLog`."""

    def __init__(self) -> None:
        self.records: list[AuditRecord] = []

    async def append(self, record: AuditRecord) -> None:
        stored = AuditRecord()
        stored.CopyFrom(record)
        stored.sequence = len(self.records) + 1
        self.records.append(stored)

    async def page(
        self,
        project: str,
        page_size: int,
        page_token: str,
        since: datetime | None = None,
        within: frozenset[str] | None = None,
    ) -> tuple[list[AuditRecord], str]:
        begin, end = pages.bounds(page_size, page_token, project)
        found = [
            record
            for record in self.records
            if record.sequence > begin
            and is_for(record, project, within)
            and (since is None or record.time.ToDatetime(since.tzinfo) >= since)
        ]
        page = found[: end - begin]
        return page, pages.token(page[-1].sequence, project) if len(found) > len(page) else ""
