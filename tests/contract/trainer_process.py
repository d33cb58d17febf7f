"""The processes that test_trainer_kills.py kills: the real trainer over the real NATS and S3 servers.

This process only imports what is slow to import, then forks a trainer for each line on its standard input and answers
with its process id.
"""

from __future__ import annotations

import functools
import os
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import services.trainer.job  # noqa: F401  (slow to import)
from services.core import runtime
from services.core.jobs import JobRunner
from services.core.jobs.nats import NatsQueue
from services.core.rpc.client import channel
from services.core.rpc.server import serve
from services.core.runtime import Runtime
from services.trainer import assembly
from services.trainer.config import TrainerSettings
from services.trainer.datasets import ScannerDatasets

SOON = timedelta(seconds=1)
"""A dead worker's job is taken over after so long, instead of half a minute."""


async def main(settings: TrainerSettings) -> None:
    torch.set_num_threads(1)
    assembly.JobRunner = functools.partial(JobRunner, lease=SOON, max_attempts=100)  # type: ignore[assignment,misc]
    async with Runtime.open("trainer", settings) as opened:
        queue = opened.jobs
        assert isinstance(queue, NatsQueue)
        opened.jobs = NatsQueue(queue._connection, ack_wait=SOON)
        trainer = assembly.Trainer(opened, settings, ScannerDatasets(channel(settings.scanner_address, settings)))
        await serve(settings, trainer.services, background=trainer.background)


if __name__ == "__main__":
    print("ready", flush=True)
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(runtime.run("trainer", TrainerSettings, main))
        print(child, flush=True)
        os.waitpid(child, 0)
