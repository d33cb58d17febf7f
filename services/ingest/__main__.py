"""The ingest service: ``python -m services.ingest``."""

from __future__ import annotations

from services.core import runtime
from services.core.auth import keyring
from services.core.rpc.server import serve
from services.core.runtime import Runtime
from services.ingest.assembly import Ingest
from services.ingest.config import IngestSettings


async def main(settings: IngestSettings) -> None:
    """Serves, and fetches sources, until the process is told to stop."""
    async with Runtime.open("ingest", settings) as opened:
        ingest = Ingest(opened, settings)
        await ingest.keys.seed(settings.ingest_seed_keys)
        await serve(
            settings,
            ingest.services,
            keys=opened.state(keyring.BUCKET),
            audit=opened.audit,
            quotas=opened.quotas,
            background=[
                ingest.fetcher.run,
                ingest.storage.tell,
                ingest.deletions.run,
                *(mirror.run for mirror in ingest.mirrors),
            ],
        )


if __name__ == "__main__":
    runtime.leave(runtime.run("ingest", IngestSettings, main))
