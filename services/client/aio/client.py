"""The client: one object for the four services."""

from __future__ import annotations

import copy
from pathlib import Path
from types import TracebackType

from services.client.access import NONE, Access
from services.client.addresses import Addresses
from services.client.aio.access import Audit, Keys
from services.client.aio.adapters import Adapters
from services.client.aio.caller import Caller
from services.client.aio.feedback import Feedback
from services.client.aio.inference import Completions, Serving
from services.client.aio.ingest import Credentials, Projects, Snapshots, Sources
from services.client.aio.quotas import Quotas
from services.client.aio.scanner import Datasets, Scans
from services.client.aio.trainer import Models, Runs
from services.client.aio.workers import Workers
from services.client.streams import blocking_channel, channel_async
from services.core.rpc import client as rpc


class AsyncCodegraft:
    """A connection to Codegraft. Close it, or use it in a ``with``.

    Every failure is an exception of services/core/errors.py, one class per reason. Reads, and creations with their
    idempotency key, are repeated over short outages; everything else is tried once.

    Attributes:
        projects: name spaces.
        sources: where code comes from; uploads.
        credentials: what opens private repositories.
        snapshots: all sources at one moment.
        scans: verdicts per file.
        datasets: what was accepted.
        runs: training, checkpoints.
        adapters: checkpoints as files, downloaded and uploaded.
        models: the catalogue, and models in the object store.
        completions: completions and chat.
        serving: which adapter answers.
        keys: API keys, and who the caller is.
        audit: who changed what.
        quotas: what projects and keys may use.
        feedback: what became of completions in editors.
        workers: who works on scans and runs.
    """

    def __init__(self, addresses: Addresses, *, access: Access = NONE, timeout: float = rpc.DEFAULT_DEADLINE) -> None:
        """Opens nothing yet: the first call connects.

        Args:
            addresses: where the services are.
            access: API key, and certificates for TLS.
            timeout: seconds a unary call may take, over all its tries; streams have none unless given.

        Raises:
            InvalidArgument: a file of the certificates cannot be read.
        """
        self.addresses = addresses
        self._timeout, self._key = timeout, access.key
        certificates = access.tls.credentials() if access.tls else None
        self._channels = [
            channel_async(rpc.target(address), certificates)
            for address in (addresses.ingest, addresses.scanner, addresses.trainer, addresses.inference)
        ]
        # Uploads go over the blocking library in both clients: services/client/streams.py says why.
        self._uploads = [
            blocking_channel(rpc.target(address), certificates) for address in (addresses.ingest, addresses.trainer)
        ]
        self._attach()

    def _attach(self) -> None:
        caller = Caller(self._timeout, self._key)
        ingest, scanner, trainer, inference = self._channels
        self.projects = Projects(ingest, caller)
        to_ingest, to_trainer = self._uploads
        self.sources = Sources(ingest, to_ingest, caller)
        self.credentials = Credentials(ingest, caller)
        self.snapshots = Snapshots(ingest, caller)
        self.scans = Scans(scanner, caller)
        self.datasets = Datasets(scanner, caller)
        self.runs = Runs(trainer, caller)
        self.adapters = Adapters(trainer, to_trainer, caller)
        self.models = Models(trainer, to_trainer, caller)
        self.completions = Completions(inference, caller)
        self.serving = Serving(inference, caller)
        self.keys = Keys(ingest, caller)
        self.audit = Audit(ingest, caller)
        self.quotas = Quotas(ingest, self._channels, caller)
        self.feedback = Feedback(inference, caller)
        self.workers = Workers((scanner, trainer), caller)

    @classmethod
    def local(cls, data: Path | None = None) -> AsyncCodegraft:
        """A client of the services that the environment names, else of the local stack, with its key.

        Args:
            data: data folder of the local stack; None means the default one.

        Raises:
            Unavailable: neither is there.
        """
        addresses = Addresses.find(data)
        return cls(addresses, access=Access.find(addresses, data))

    def with_timeout(self, timeout: float) -> AsyncCodegraft:
        """This client with another deadline for unary calls, over the same connections; closing one closes both.

        ``codegraft.with_timeout(600).snapshots.create("acme")`` waits long for one call.

        Args:
            timeout: seconds, over all tries of a call.
        """
        other = copy.copy(self)
        other._timeout = timeout
        other._attach()
        return other

    def with_key(self, key: str) -> AsyncCodegraft:
        """This client with another caller's API key or token, over the same connections; closing one closes both.

        For who calls on behalf of others, as a gateway does.
        """
        other = copy.copy(self)
        other._key = key
        other._attach()
        return other

    async def close(self) -> None:
        """Closes the connections; running calls end."""
        for uploads in self._uploads:
            uploads.close()
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> AsyncCodegraft:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
