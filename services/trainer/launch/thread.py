"""Training in a thread of the service.

It takes no seconds to start, which is what tests of many tiny runs need, and it is the same path in everything else:
the same folder, the same messages, the same :func:`services.trainer.rank.train`. But a run that is killed for its
memory takes the service with it, torch stays loaded, and there is one process only.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence

from codegraft.trainer.v1.training_pb2 import TrainingMessage
from services.trainer.launch.folder import RunFolder
from services.trainer.launch.launcher import Processes, follow


class ThreadLauncher:
    """See :class:`~services.trainer.launch.launcher.Launcher`."""

    def start(self, folder: RunFolder, devices: Sequence[str] = ()) -> Processes:
        return _Thread(folder, devices[0] if devices else "")


class _Thread:
    def __init__(self, folder: RunFolder, device: str) -> None:
        self._folder = folder
        self._device = device
        self._thread = threading.Thread(target=self._train, name="training", daemon=True)
        self._thread.start()

    def events(self) -> AsyncIterator[TrainingMessage]:
        return follow(self._folder, lambda: not self._thread.is_alive(), lambda: "see the traceback")

    def stop(self) -> None:
        self._folder.stop()

    async def fence(self) -> None:
        self._folder.stop()
        await asyncio.to_thread(self._thread.join)

    def _train(self) -> None:
        from services.trainer import rank  # imports torch: seconds in which calls are answered already

        rank.train(self._folder, device=self._device)
