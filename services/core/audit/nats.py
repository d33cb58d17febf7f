"""The audit log as the JetStream stream AUDIT, whose messages nobody can delete before their time."""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta

from nats.js import api

from codegraft.access.v1.audit_pb2 import AuditRecord
from services.core import errors, pages
from services.core.audit.log import is_for
from services.core.nats_connection import NatsConnection, translated
from services.core.nats_reader import Interrupted, OrderedReader

STREAM = "AUDIT"
KEPT = timedelta(days=400)
"""A year, and time to read it."""
_NOBODYS = "_"
"""In place of a project in a subject; no project has that id."""


class NatsAudit:
    """See :class:`~services.core.audit.log.AuditLog`. The stream is made at its first use.

    Args:
        service: whose records this process appends.
    """

    def __init__(self, connection: NatsConnection, service: str) -> None:
        self._connection = connection
        self._service = service
        self._ready = False

    async def append(self, record: AuditRecord) -> None:
        subject = f"audit.{self._service}.{record.project.removeprefix('projects/') or _NOBODYS}"
        headers: dict[str, str] = {api.Header.MSG_ID: secrets.token_hex(16)}
        await self._ensure()
        try:
            with translated("write the audit log"):
                await self._connection.js.publish(subject, record.SerializeToString(), headers=headers)
        except errors.StateUnavailable:
            self._ready = False
            raise

    async def page(
        self,
        project: str,
        page_size: int,
        page_token: str,
        since: datetime | None = None,
        within: frozenset[str] | None = None,
    ) -> tuple[list[AuditRecord], str]:
        begin, end = pages.bounds(page_size, page_token, project)
        # What is of several projects lies among what is nobody's; neither is much.
        own = [f"audit.*.{project.removeprefix('projects/')}", f"audit.*.{_NOBODYS}"]
        wanted = own if project else ["audit.>"]
        await self._ensure()
        found: list[AuditRecord] = []
        waiting = 1
        try:
            # A page after the first continues behind a record that was recent enough already.
            start = since if not page_token else None
            async with OrderedReader(self._connection, STREAM, wanted, after=begin, since=start) as reader:
                waiting = reader.backlog
                while waiting and len(found) < end - begin:
                    if (msg := await reader.next()) is not None:
                        waiting = msg.metadata.num_pending
                        record = AuditRecord.FromString(msg.data)
                        record.sequence = msg.metadata.sequence.stream
                        if is_for(record, project, within):
                            found.append(record)
        except Interrupted:
            raise errors.StateUnavailable("reading the audit log was interrupted", retry_after=1.0) from None
        return found, pages.token(found[-1].sequence, project) if waiting and found else ""

    async def _ensure(self) -> None:
        if self._ready:
            return
        await self._connection.ensure_stream(stream_config())
        self._ready = True


def stream_config() -> api.StreamConfig:
    """How the stream is made."""
    return api.StreamConfig(
        name=STREAM,
        subjects=["audit.>"],
        retention=api.RetentionPolicy.LIMITS,
        storage=api.StorageType.FILE,
        max_age=KEPT.total_seconds(),
        deny_delete=True,
        deny_purge=True,
    )
