"""Copies of projects and sources in the object store, for `codegraft rebuild` (services/core/state/mirror.py).

Credentials have none: not even sealed ones are to be read by every service. Uploads need none: what a source is made of
is a blob, and the source names it.
"""

from __future__ import annotations

from codegraft.ingest.v1.project_pb2 import Project
from codegraft.ingest.v1.source_pb2 import Source
from services.core.state.mirror import Mirror
from services.core.store import ObjectStore
from services.ingest.records import BUCKET, Tables

PROJECT_FIELDS = (
    "name",
    "title",
    "exclude",
    "include",
    "languages_off",
    "exclude_licenses",
    "keep_completions",
    "keep_completions_time",
    "create_time",
    "update_time",
    "request_id",
)
SOURCE_FIELDS = (
    "name",
    "git",
    "bundle",
    "archive",
    "file",
    "url",
    "split",
    "split_rules",
    "exclude",
    "include",
    "honour_gitattributes",
    "sync_interval_seconds",
    "commit",
    "file_count",
    "byte_count",
    "content_digest",
    "skipped",
    "create_time",
    "request_id",
    "creator",
)
"""Without how a fetch goes: a source that comes back is fetched anew, of git only what has moved."""


def mirrors(tables: Tables, store: ObjectStore) -> tuple[Mirror[Project], Mirror[Source]]:
    """The mirrors of all that is copied. Of a project also its end is kept: its datasets and adapters may outlive it,
    and must not bring it back."""
    return (
        Mirror(BUCKET, Project, tables.projects, store, fields=PROJECT_FIELDS, remembers=True),
        Mirror(BUCKET, Source, tables.sources, store, fields=SOURCE_FIELDS),
    )
