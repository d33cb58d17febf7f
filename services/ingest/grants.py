"""What keys may do in a project, and its quota, taken away when it is deleted: both are by name, and would be of the
next project that has it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from codegraft.access.v1.access_pb2 import StoredKey
from codegraft.access.v1.audit_pb2 import AuditRecord
from codegraft.ingest.v1.project_pb2 import Project, ProjectDeletion
from services.core import log
from services.core.audit import record as audit
from services.core.audit.log import AuditLog
from services.core.errors import CodegraftError, EtagMismatch, KeyNotFound, NotFound
from services.core.quota.quotas import table
from services.core.state import StateStore, Table

METHOD = "/codegraft.ingest.v1.ProjectService/DeleteProject"
logger = log.get(__name__)


class Grants:
    """See the module's docstring.

    Args:
        state: the bucket services.core.auth.keyring.BUCKET.
        audit: gets a record of every change, of who deleted the project. The call's own would show its operators what
            else a key is for.
    """

    def __init__(self, state: StateStore, projects: Table[Project], audit: AuditLog) -> None:
        self._keys, self._quotas = Table(state, StoredKey, missing=KeyNotFound), table(state)
        self._projects, self._audit = projects, audit

    async def end(self, deletion: ProjectDeletion) -> None:
        """Takes all away; nothing where the project is there (again).

        Raises:
            Aborted, StateUnavailable: some of it may be there still.
        """
        project = deletion.name
        keys = [each for each in await self._keys.all() if project in each.key.projects]
        quota = None if deletion.keeps_quota else await self._quotas.find(f"{project}/quota")
        # After they were read: what a new project of that name may have by now is not among them.
        if await self._projects.find(project) is not None:
            return

        def leave(there: StoredKey) -> None:
            if project not in there.key.projects:
                return
            there.key.projects.remove(project)
            if not there.key.projects and not there.key.HasField("revoke_time"):
                there.key.revoke_time.GetCurrentTime()

        for each in keys:
            with audit.gathering() as changed:
                await self._keys.mutate(each.name, leave)
            await self._record(deletion, each.name, list(each.key.projects), changed.changes)
        if quota is not None:
            with audit.gathering() as changed, contextlib.suppress(NotFound, EtagMismatch):  # another replica did
                await self._quotas.delete(quota.name, etag=quota.etag)
            await self._record(deletion, quota.name, [project], changed.changes)

    async def _record(
        self, deletion: ProjectDeletion, name: str, projects: Sequence[str], changes: Sequence[audit.Change]
    ) -> None:
        if not changes:
            return
        record = AuditRecord(method=METHOD, service="ingest", code="OK")
        record.caller, record.request_id = deletion.caller, deletion.request_id
        record.project = projects[0] if len(projects) == 1 else ""
        record.projects.extend(sorted(projects))
        record.resources.extend([deletion.name, name])
        record.time.GetCurrentTime()
        try:
            await self._audit.append(audit.fill(record, changes))
        except CodegraftError as error:  # as of a call: the change has happened
            logger.error("a change is missing in the audit log", error=error.message, resource=name, method=METHOD)
