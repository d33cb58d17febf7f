"""Calls on their way into the audit log."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from codegraft.access.v1.audit_pb2 import AuditRecord
from services.core import log, names
from services.core.audit.log import AuditLog
from services.core.audit.record import Gathered, fill, gathering
from services.core.auth import policy
from services.core.auth.caller import Caller
from services.core.errors import CodegraftError, InvalidName

logger = log.get(__name__)


class Audit:
    """Makes the entries of one server's calls.

    Args:
        log: None keeps no records.
    """

    def __init__(self, log: AuditLog | None) -> None:
        self._log = log
        self._writing: set[asyncio.Task[None]] = set()

    def entry(self, method: str) -> Entry:
        """The entry of a call that begins."""
        return Entry(self, method, self._log is not None and policy.changes(method))

    def write(self, record: AuditRecord) -> asyncio.Task[None]:
        """Appends the record; a cancelled call must not take that along."""
        task = asyncio.ensure_future(self._append(record))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        return task

    async def settle(self) -> None:
        """Returns once everything is written."""
        await asyncio.gather(*self._writing)

    async def _append(self, record: AuditRecord) -> None:
        if self._log is None:
            return
        try:
            await self._log.append(record)
        except CodegraftError as error:
            # The change has happened, and its caller must learn that it has: the logs keep what they can.
            logger.error(
                "a call is missing in the audit log",
                error=error.message,
                method=record.method,
                caller=record.caller,
                resources=list(record.resources),
                code=record.code,
            )


class Entry:
    """One call. Only calls of known callers that may change something are written."""

    def __init__(self, audit: Audit, method: str, wanted: bool) -> None:
        self._audit = audit
        self._wanted = wanted
        self._record = AuditRecord(method=method, service=".".join(method.split(".")[1:2]))
        self._gathered = Gathered()
        self._identified = False

    def identified(self, caller: Caller) -> None:
        """Notes who calls."""
        self._record.caller = caller.subject
        self._identified = True

    def requested(self, request: Any) -> None:
        """Notes what the request names."""
        if self._wanted:
            found = policy.resources(self._record.method, request)
            self._record.resources[:] = [name[:300] for name in found]
            if found and found[0].startswith("projects/"):
                with contextlib.suppress(InvalidName):  # nobody's; it would go into a subject of NATS
                    project = names.project_of(found[0])
                    names.parse(names.PROJECT, project)
                    self._record.project = project

    @contextlib.contextmanager
    def gathering(self) -> Iterator[None]:
        """For the time of the handler: what it changes is noted."""
        if not self._wanted:
            yield
            return
        with gathering() as self._gathered:
            yield

    async def end(self, code: str, reason: str, request_id: str) -> None:
        """Returns once the log has the call."""
        if self._wanted and self._identified:
            await asyncio.shield(self._audit.write(self._filled(code, reason, request_id)))
            self._wanted = False

    def end_later(self, code: str, reason: str, request_id: str) -> None:
        """Has the call written, without waiting for it: nobody waits for the call any more."""
        if self._wanted and self._identified:
            self._audit.write(self._filled(code, reason, request_id))
            self._wanted = False

    def _filled(self, code: str, reason: str, request_id: str) -> AuditRecord:
        self._record.code, self._record.reason, self._record.request_id = code, reason, request_id
        self._record.time.GetCurrentTime()
        if not self._record.project:
            self._record.projects[:] = self._gathered.projects
            self._record.project = self._gathered.projects[0] if len(self._gathered.projects) == 1 else ""
        self._record.resources.extend(name[:300] for name in self._gathered.resources)
        return fill(self._record, self._gathered.changes)
