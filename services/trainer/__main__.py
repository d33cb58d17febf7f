"""The trainer service: ``python -m services.trainer``."""

from __future__ import annotations

import os

from services.core import runtime
from services.core.auth import keyring
from services.core.rpc.client import channel
from services.core.rpc.server import serve
from services.core.runtime import Runtime
from services.trainer.assembly import Trainer
from services.trainer.config import TrainerSettings
from services.trainer.datasets import ScannerDatasets


async def main(settings: TrainerSettings) -> None:
    """Serves, and works on runs, until the process is told to stop."""
    os.nice(settings.trainer_nice)
    async with Runtime.open("trainer", settings) as opened:
        trainer = Trainer(opened, settings, ScannerDatasets(channel(settings.scanner_address, settings)))
        await serve(
            settings,
            trainer.services,
            keys=opened.state(keyring.BUCKET),
            audit=opened.audit,
            quotas=opened.quotas,
            background=trainer.background,
        )


if __name__ == "__main__":
    runtime.leave(runtime.run("trainer", TrainerSettings, main))
