"""The records of ingest, and the checks that come before every change of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from codegraft.ingest.v1.credential_pb2 import StoredCredential
from codegraft.ingest.v1.project_pb2 import Project, ProjectDeletion
from codegraft.ingest.v1.snapshot_pb2 import Snapshot
from codegraft.ingest.v1.source_pb2 import Source
from codegraft.ingest.v1.upload_pb2 import Upload
from services.core import names
from services.core.errors import (
    CredentialNotFound,
    ProjectNotFound,
    RequestIdReused,
    ResourceExists,
    SnapshotNotFound,
    SourceNotFound,
    UploadNotFound,
)
from services.core.state import StateStore, Table

BUCKET = "ingest"


@dataclass(frozen=True, slots=True)
class Tables:
    """Everything that ingest keeps in JetStream KV."""

    projects: Table[Project]
    sources: Table[Source]
    uploads: Table[Upload]
    snapshots: Table[Snapshot]
    credentials: Table[StoredCredential]
    deletions: Table[ProjectDeletion]

    @classmethod
    def of(cls, state: StateStore) -> Tables:
        """The tables in a bucket."""
        return cls(
            Table(state, Project, missing=ProjectNotFound),
            Table(state, Source, missing=SourceNotFound),
            Table(state, Upload, missing=UploadNotFound),
            Table(state, Snapshot, missing=SnapshotNotFound),
            Table(state, StoredCredential, missing=CredentialNotFound),
            Table(state, ProjectDeletion, missing=ProjectNotFound),
        )

    @property
    def of_project(self) -> tuple[Table[Any], ...]:
        """The tables of what belongs to a project, in the order in which it can go."""
        return self.sources, self.snapshots, self.uploads, self.credentials

    async def known(self, project: str, field: str = "parent") -> Project:
        """The project of that name.

        Raises:
            InvalidName: that is no project name.
            ProjectNotFound: there is no such project.
        """
        names.parse(names.PROJECT, project, field=field)
        found = await self.projects.find(project)
        if found is None:
            raise ProjectNotFound(
                f"{project} does not exist", field=field, hint="Create it with CreateProject.", name=project
            )
        return found


def same_request(there: Project | Source, same: bool, request_id: str) -> None:
    """Decides what a Create on an existing name means: the same call once more is fine.

    Args:
        there: the stored record.
        same: whether the call asks for just what is stored.
        request_id: the call's.

    Raises:
        RequestIdReused: the same request_id came before with another request.
        ResourceExists: another call made it.
    """
    if not request_id or there.request_id != request_id:
        raise ResourceExists(
            f"{there.name} exists already", field="name", hint="Choose another id, or use the existing one."
        )
    if not same:
        raise RequestIdReused(
            f"request_id {request_id!r} came before with another request",
            field="request_id",
            hint="Use a new request_id for a new request.",
        )
