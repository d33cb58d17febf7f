"""One of the processes that train a run: ``python -m services.trainer.launch.process FOLDER``, as torchrun does it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from services.core import garbage, log
from services.trainer.launch import AGENT_VARIABLE
from services.trainer.launch.folder import RunFolder

_PR_SET_PDEATHSIG = 1

logger = log.get(__name__)


def main(folder: str) -> None:
    """Trains; the exit status says whether the group has to start again."""
    _end_with_agent()
    log.configure("trainer")
    with garbage.unsearched():
        from services.trainer import rank  # imports torch: seconds in which the agent may end already
        from services.trainer.ranks import joined

    with joined() as ranks, log.bound(rank=str(ranks.rank)):
        try:
            rank.train(RunFolder(Path(folder)), ranks)
        except Exception:  # its own, or the echo of another rank's end: the group starts again either way
            logger.exception("a rank failed")
            sys.exit(1)


def _end_with_agent() -> None:
    """From now on the kernel kills this process when the one that started it ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    agent = os.environ.get(AGENT_VARIABLE)
    if agent is not None and os.getppid() != int(agent):  # it ended before
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
