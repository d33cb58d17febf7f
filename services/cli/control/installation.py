"""The installation whose control state is looked at: NATS and the object store, with the operator's own credentials."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import nats.js.errors
import structlog
from pydantic import SecretStr

from services.cli.local import gateway
from services.cli.local.files import DataFolder, ServiceCredentials, StackInfo, StackState
from services.cli.local.stack import BUCKET
from services.client.addresses import folder_of
from services.core import config, log
from services.core.config import CoreSettings
from services.core.errors import Unavailable
from services.core.nats_connection import NatsConnection, translated
from services.core.runtime import connect_nats, s3_address
from services.core.state.nats import NatsState, stream_of
from services.core.store import S3Store
from services.core.store.artifacts import Artifacts

URL_VARIABLE = config.PREFIX + "NATS_URL"
"""Names an installation that is not the local stack, together with the other settings of NATS and S3."""


@dataclass(frozen=True, slots=True)
class Installation:
    """Where an installation is, and how we are let in."""

    settings: CoreSettings
    """NATS and S3 with credentials that may see everything; the services' addresses."""
    services: Mapping[str, ServiceCredentials] = field(default_factory=lambda: MappingProxyType({}))
    """The services' own credentials, where they are known: in a local stack."""
    folder: Path | None = None
    """Data folder of the local stack; None when it is another installation."""
    gateway: str = ""
    """Address of the gateway, with http or https; empty when none is known."""

    @classmethod
    def find(cls, data: Path | None = None) -> Installation:
        """The one that the environment names (``CODEGRAFT_NATS_URL`` and so on), else the local stack.

        Args:
            data: data folder of the local stack, which then comes before the environment.

        Raises:
            Unavailable: neither is there.
            InvalidArgument: a setting is not usable.
        """
        if data is None and os.environ.get(URL_VARIABLE):
            return cls(config.load(CoreSettings))
        folder = DataFolder(folder_of(data))
        info = folder.info()
        if info.state is not StackState.READY:
            raise Unavailable(
                f"no local stack runs in {folder.root}",
                hint=f"Start one with `codegraft up --detach`, or set {URL_VARIABLE}, CODEGRAFT_NATS_USER, "
                "CODEGRAFT_NATS_PASSWORD, CODEGRAFT_S3_ENDPOINT, CODEGRAFT_S3_ACCESS_KEY and CODEGRAFT_S3_SECRET_KEY.",
            )
        return cls.local(folder, info)

    @classmethod
    def local(cls, folder: DataFolder, info: StackInfo) -> Installation:
        """The stack that runs in the folder."""
        credentials = folder.credentials()
        settings = CoreSettings(
            nats_url=f"nats://{info.processes['nats'].address}",
            nats_user=credentials.nats_user,
            nats_password=SecretStr(credentials.nats_password),
            nats_ca_file=None,
            nats_cert_file=None,
            nats_key_file=None,
            nats_replicas=1,
            s3_endpoint=info.processes["s3"].address,
            s3_access_key=SecretStr(credentials.s3_access_key),
            s3_secret_key=SecretStr(credentials.s3_secret_key),
            s3_bucket=BUCKET,
            s3_secure=False,
            tls_ca_file=None,
            tls_cert_file=None,
            tls_key_file=None,
            tls_client_ca_file=None,
            api_key=SecretStr(credentials.api_key),
            ingest_address=info.processes["ingest"].address,
            scanner_address=info.processes["scanner"].address,
            trainer_address=info.processes["trainer"].address,
            inference_address=info.processes["inference"].address,
        )
        own = info.processes.get(gateway.NAME)
        return cls(settings, credentials.services, folder.root, gateway.url(own.address) if own else "")


class Control:
    """The open connections to an installation. Make it with :func:`opened`.

    Attributes:
        nats: the connection to NATS.
        store: the object store.
        artifacts: the manifests in it.
    """

    def __init__(self, nats: NatsConnection, store: S3Store, cache_dir: Path) -> None:
        self.nats = nats
        self.store = store
        self.artifacts = Artifacts(store, cache_dir)

    def state(self, bucket: str) -> NatsState:
        """The records of a bucket, which its first use makes."""
        return NatsState(self.nats, bucket)

    async def has_stream(self, stream: str) -> bool:
        """Whether the stream is there; looking does not make it.

        Raises:
            StateUnavailable: NATS does not answer.
        """
        with translated(f"look at the stream {stream}"):
            try:
                await self.nats.js.stream_info(stream)
            except nats.js.errors.NotFoundError:
                return False
        return True

    async def has_bucket(self, bucket: str) -> bool:
        """Whether the bucket is there."""
        return await self.has_stream(stream_of(bucket))


@asynccontextmanager
async def opened(installation: Installation) -> AsyncIterator[Control]:
    """Connects to NATS and to the object store.

    Raises:
        StateUnavailable, StoreUnavailable: one does not answer, or refuses the credentials.
    """
    settings = installation.settings
    if not structlog.is_configured():
        log.configure("codegraft", "error")  # on stderr: what is printed is the command's own
    connection = await connect_nats("operator", settings)
    store = S3Store(s3_address(settings))
    try:
        await store.check()
        yield Control(connection, store, settings.cache_dir)
    finally:
        store.close()
        await connection.close()
