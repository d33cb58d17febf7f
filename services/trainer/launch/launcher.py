"""What a place to train at has to offer, and how its processes are followed."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from codegraft.trainer.v1.training_pb2 import TrainingMessage
from services.core.errors import DiskFull, InternalError
from services.trainer.launch.folder import RunFolder

LOOK_SECONDS = 0.05
"""Between two looks for messages. A file is looked at rather than a pipe read: it works over machines, and a worker
that is slow for a moment holds up nobody."""
NO_ROOM = 1 << 20
"""Bytes: a disk with less is full."""


class Processes(Protocol):
    """The processes that train a run."""

    def events(self) -> AsyncIterator[TrainingMessage]:
        """What happens, in order, each thing once; ends when training has.

        Raises:
            JobCancelled: it was asked to :meth:`stop`, and has; the checkpoint of the last step came before.
            CodegraftError: why it cannot go on, as the processes say.
            InternalError: they ended without a word.
        """
        ...

    def stop(self) -> None:
        """Asks the processes to end after the step they are at, and to leave a checkpoint of it; returns at once."""
        ...

    async def fence(self) -> None:
        """Ends the processes, if they still run; nothing of them works or writes any more when it returns."""
        ...


class Launcher(Protocol):
    """Starts the processes of runs."""

    def start(self, folder: RunFolder, devices: Sequence[str] = ()) -> Processes:
        """Starts training of what a prepared folder asks for.

        Args:
            devices: names of those that it may use ("cuda:1"), one for each process; empty leaves it to the settings.
        """
        ...


class Steps:
    """Tells what is new from what a restarted group tells again: by its kind and its step; there is one proof."""

    def __init__(self) -> None:
        self._reached: dict[str, int] = {}

    def is_new(self, message: TrainingMessage) -> bool:
        """Whether it was not told before. Each group says once that it has loaded, which is always news."""
        kind = message.WhichOneof("message") or ""
        if kind == "loaded":
            return True
        step: int = getattr(getattr(message, kind), "step", 0)
        is_new = step > self._reached.get(kind, -1)
        self._reached[kind] = max(step, self._reached.get(kind, -1))
        return is_new


async def follow(
    folder: RunFolder, has_ended: Callable[[], bool], describe: Callable[[], str]
) -> AsyncIterator[TrainingMessage]:
    """The messages of a folder until its processes have ended; see :meth:`Processes.events`.

    Args:
        describe: how they ended, for people.
    """
    steps, offset = Steps(), 0
    while True:
        # Both before the look at the messages, so that none is missed that was written earlier.
        is_last, failure = has_ended(), folder.failure()
        messages, offset = folder.read(offset)
        for message in messages:
            if steps.is_new(message):
                yield message
            if message.HasField("ended"):  # what is left is to leave, which takes torch seconds
                return
        if failure is not None:
            raise failure
        if is_last:
            break
        if not messages:
            await asyncio.sleep(LOOK_SECONDS)
    if shutil.disk_usage(folder.path).free < NO_ROOM:  # nor was there any to say so
        raise DiskFull.of(folder.path.parent, "training needs room for adapters and states")
    raise InternalError(
        f"the training processes ended without a result: {describe()}",
        hint="See the worker's log; a process that was ended by SIGKILL most likely needed too much memory.",
    )
