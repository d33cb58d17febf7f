"""The parts of one ingest process, wired together over its connections."""

from __future__ import annotations

from collections.abc import Sequence

from codegraft.access.v1 import access_pb2_grpc, audit_pb2_grpc, quota_pb2_grpc
from codegraft.ingest.v1 import (
    credential_pb2_grpc,
    project_pb2_grpc,
    snapshot_pb2_grpc,
    source_pb2_grpc,
    upload_pb2_grpc,
)
from services.core.auth import keyring
from services.core.quota.usage import usage
from services.core.rpc.server import Registration
from services.core.runtime import Runtime
from services.ingest.collector import Collector
from services.ingest.config import IngestSettings
from services.ingest.copies import mirrors
from services.ingest.deletions import Deletions
from services.ingest.fetcher import Fetcher
from services.ingest.keys import Keys
from services.ingest.quotas import QuotaDesk
from services.ingest.records import BUCKET, Tables
from services.ingest.servicers.access import AccessServicer
from services.ingest.servicers.audit import AuditServicer
from services.ingest.servicers.credentials import CredentialServicer
from services.ingest.servicers.projects import ProjectServicer
from services.ingest.servicers.quotas import QuotaServicer
from services.ingest.servicers.snapshots import SnapshotServicer
from services.ingest.servicers.sources import SourceServicer
from services.ingest.servicers.uploads import UploadServicer
from services.ingest.snapshots import Snapshots
from services.ingest.storage import Storage
from services.ingest.uploads import Uploads
from services.ingest.workspace import UPLOADS, Workspace


class Ingest:
    """What a process serves, and what it does beside that.

    Attributes:
        services: for services/core/rpc/server.
        fetcher: run it in the background.
        storage: run its telling in the background.
        mirrors: run them in the background.
        deletions: run them in the background.
        tables: its records.
        keys: the API keys.
    """

    def __init__(self, runtime: Runtime, settings: IngestSettings) -> None:
        self.tables = tables = Tables.of(runtime.state(BUCKET))
        spool = settings.cache_dir / "ingest" / UPLOADS
        self.keys = Keys(runtime.state(keyring.BUCKET))
        uploads = Uploads(tables.uploads, runtime.blobs, spool, settings.ingest_max_upload_bytes)
        snapshots = Snapshots(runtime, tables)
        workspace = Workspace(settings.cache_dir / "ingest", settings.ingest_kept_bytes)
        collector = Collector(runtime, settings, tables, uploads, workspace)
        self.storage = storage = Storage(runtime, tables)
        self.fetcher = Fetcher(runtime, settings, tables, collector, snapshots, workspace, storage.places)
        self.deletions = deletions = Deletions(runtime, tables)
        self.mirrors = mirrors(tables, runtime.store)
        self.services: Sequence[Registration] = [
            (
                project_pb2_grpc.add_ProjectServiceServicer_to_server,
                ProjectServicer(tables, runtime.events, deletions),
                "codegraft.ingest.v1.ProjectService",
            ),
            (
                source_pb2_grpc.add_SourceServiceServicer_to_server,
                SourceServicer(tables, settings, snapshots, storage.places),
                "codegraft.ingest.v1.SourceService",
            ),
            (
                upload_pb2_grpc.add_UploadServiceServicer_to_server,
                UploadServicer(tables, uploads, storage.places),
                "codegraft.ingest.v1.UploadService",
            ),
            (
                snapshot_pb2_grpc.add_SnapshotServiceServicer_to_server,
                SnapshotServicer(tables, runtime, snapshots),
                "codegraft.ingest.v1.SnapshotService",
            ),
            (
                credential_pb2_grpc.add_CredentialServiceServicer_to_server,
                CredentialServicer(tables, settings.vault),
                "codegraft.ingest.v1.CredentialService",
            ),
            (
                access_pb2_grpc.add_AccessServiceServicer_to_server,
                AccessServicer(self.keys),
                "codegraft.access.v1.AccessService",
            ),
            (
                audit_pb2_grpc.add_AuditServiceServicer_to_server,
                AuditServicer(runtime.audit, deletions),
                "codegraft.access.v1.AuditService",
            ),
            (
                quota_pb2_grpc.add_QuotaServiceServicer_to_server,
                QuotaServicer(QuotaDesk(runtime.state(keyring.BUCKET), tables, self.keys, runtime.quotas)),
                "codegraft.access.v1.QuotaService",
            ),
            usage(runtime.quotas, {}, storage.stored),
        ]
