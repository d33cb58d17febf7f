"""The processes that test_trainer_kills.py kills: the real trainer over the real NATS and S3 servers.

This process only imports what is slow to import, then forks a trainer for each line on its standard input and answers
with its process id. A line is the lease of its jobs in seconds, and ``beside`` when the next one may start meanwhile.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import services.trainer.job  # noqa: F401  (slow to import)
from services.core import runtime
from services.core.jobs import JobRunner
from services.core.rpc.client import channel
from services.core.rpc.server import serve
from services.core.runtime import Runtime
from services.trainer import assembly
from services.trainer.config import TrainerSettings
from services.trainer.datasets import ScannerDatasets


async def main(settings: TrainerSettings) -> None:
    """Serves and trains; a dead worker's job is taken over after the lease."""
    torch.set_num_threads(1)
    assembly.JobRunner = functools.partial(JobRunner, max_attempts=100)  # type: ignore[assignment,misc]
    async with Runtime.open("trainer", settings) as opened:
        trainer = assembly.Trainer(opened, settings, ScannerDatasets(channel(settings.scanner_address, settings)))
        await serve(settings, trainer.services, background=trainer.background)


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, *beside = line.split()
        child = os.fork()
        if not child:
            os.environ["CODEGRAFT_JOB_LEASE_SECONDS"] = seconds
            os._exit(runtime.run("trainer", TrainerSettings, main))
        print(child, flush=True)
        if not beside:
            os.waitpid(child, 0)
