"""The process that starts a run's ranks by torch elastic: ``python -m services.trainer.launch.agent FOLDER PROCESSES``.

It is ``torchrun --standalone`` with one thing more: when its input ends, so do it and its ranks, for the service that
started it is gone. A rank that dies makes the whole group start again, and go on from the last checkpoint.
"""

from __future__ import annotations

import os
import sys
import threading

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from services.core import log
from services.trainer.launch import AGENT_VARIABLE, MAX_RESTARTS, STORE_OF_ITS_OWN

logger = log.get(__name__)


def main(folder: str, processes: int) -> int:
    """Starts the ranks and waits for their end; the exit status."""
    log.configure("trainer")
    threading.Thread(target=_end_with_input, daemon=True).start()
    os.environ[AGENT_VARIABLE] = str(os.getpid())
    os.environ.update(STORE_OF_ITS_OWN)
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=os.path.basename(folder),
        max_restarts=MAX_RESTARTS,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(launch, sys.executable)("-m", "services.trainer.launch.process", folder)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        logger.error("a rank failed too often", rank=rank, exit_code=first.exitcode)
        return 1
    return 0


def _end_with_input() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
