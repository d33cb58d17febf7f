"""Training in processes of its own on this machine, started and restarted by torch elastic (what torchrun uses).

    service -- agent (torch elastic) -- rank 0
                                     -- rank 1 ...

The service imports no torch. The agent notices that the service is gone by the end of its input, and each rank is
killed by the kernel when the agent is gone; so nothing trains on that nobody follows. What they write to stderr comes
out in the service's log, line by line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import IO

from codegraft.trainer.v1.training_pb2 import TrainingMessage
from services.core import config, log
from services.trainer.launch.folder import RunFolder
from services.trainer.launch.launcher import Processes, follow

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_TAIL = 20
"""Lines of stderr that are told together with a crash."""

logger = log.get(__name__)


class ElasticLauncher:
    """See :class:`~services.trainer.launch.launcher.Launcher`.

    Args:
        processes: ranks of a run.
    """

    def __init__(self, processes: int = 1) -> None:
        self._processes = processes

    def start(self, folder: RunFolder, devices: Sequence[str] = ()) -> Processes:
        return _Group(folder, self._processes, devices)


class _Group:
    def __init__(self, folder: RunFolder, processes: int, devices: Sequence[str]) -> None:
        self._folder = folder
        argv = [sys.executable, "-m", "services.trainer.launch.agent", str(folder.path), str(processes)]
        # No preexec_fn: Python would fork for it, which gRPC's threads do not survive; without one it only execs.
        self._agent = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment(os.environ, devices),
            start_new_session=True,
        )
        self._said: deque[str] = deque(maxlen=_TAIL)
        assert self._agent.stderr is not None
        self._relay = threading.Thread(target=relay, args=(self._agent.stderr, self._said), daemon=True)
        self._relay.start()

    def events(self) -> AsyncIterator[TrainingMessage]:
        return follow(self._folder, lambda: self._agent.poll() is not None, self._describe)

    def stop(self) -> None:
        self._folder.stop()

    async def fence(self) -> None:
        self._agent.kill()  # the kernel kills its ranks
        await asyncio.to_thread(self._agent.wait)
        await asyncio.to_thread(self._relay.join)  # they hold the other end of its pipe: all have ended
        assert self._agent.stdin is not None
        self._agent.stdin.close()

    def _describe(self) -> str:
        self._relay.join(timeout=1)
        code = self._agent.wait()
        how = f"the agent was ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        logger.error("training crashed", how=how, said="\n".join(self._said))
        return how


def environment(own: Mapping[str, str], devices: Sequence[str]) -> Mapping[str, str]:
    """The processes' environment: the service's own, and of its GPUs only those of the run.

    The service's settings are left out: those that matter are in the folder, and the rest holds secrets.
    """
    inherited = {name: value for name, value in own.items() if not name.startswith(config.PREFIX)}
    numbers = [int(device.removeprefix("cuda:")) for device in devices if device.startswith("cuda:")]
    if numbers:
        # A device's number counts those that the service sees, which may have been chosen for it in the same way.
        visible = inherited.get(_VISIBLE, "").split(",") if inherited.get(_VISIBLE) else None
        inherited[_VISIBLE] = ",".join(visible[number] if visible else str(number) for number in numbers)
    return inherited


def relay(stream: IO[bytes], said: deque[str]) -> None:
    """Lines of JSON come from services/core/log and pass as they are; what libraries print is logged, and kept."""
    for raw in stream:
        line = log.scrub(raw.decode(errors="replace").rstrip())
        with contextlib.suppress(ValueError):
            if isinstance(json.loads(line), dict):
                sys.stderr.write(line + "\n")
                continue
        if line:
            said.append(line)
            logger.info("said by a training process", line=line)
