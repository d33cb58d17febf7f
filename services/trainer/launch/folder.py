"""The folder that a run's worker and its training processes share: all that either side knows of the other.

    spec.binpb        what to do; written by the worker before anything starts
    messages.binpb    what happens; appended by rank 0
    failure.binpb     why it cannot go on; written once, by any rank
    stop              is there when training shall end after the step it is at
    adapters/{step}   a checkpoint's adapter, until the worker has taken it
    states/{step}     the state beside it; the newest one stays: from there a restarted group goes on. Step 0 has none

A checkpoint counts from its message on. Needs no torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from pathlib import Path

from codegraft.trainer.v1.training_pb2 import CheckpointWritten, TrainingFailure, TrainingMessage, TrainingSpec
from services.core.errors import CodegraftError, by_reason

_LENGTH = struct.Struct(">I")


def files_in(folder: Path) -> dict[str, Path]:
    """The files of a folder by name."""
    return {file.name: file for file in sorted(folder.iterdir())}


class RunFolder:
    """See the module. Both sides use it; the methods say whose they are.

    Attributes:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._messages = path / "messages.binpb"
        self._failure = path / "failure.binpb"
        self._stop = path / "stop"

    # --- the worker's side ------------------------------------------------------------------------------------------

    def prepare(self, spec: TrainingSpec) -> None:
        """Makes a new folder ready for :meth:`Launcher.start`."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "spec.binpb").write_bytes(spec.SerializeToString())
        self._messages.touch()

    def read(self, offset: int = 0) -> tuple[list[TrainingMessage], int]:
        """The whole messages from an offset on, and the offset of the next one."""
        with self._messages.open("rb") as file:
            file.seek(offset)
            found = file.read()
        messages, start = [], 0
        while start + _LENGTH.size <= len(found):
            (length,) = _LENGTH.unpack_from(found, start)
            end = start + _LENGTH.size + length
            if end > len(found):  # it is just being written, or its writer was killed
                break
            messages.append(TrainingMessage.FromString(found[start + _LENGTH.size : end]))
            start = end
        return messages, offset + start

    def failure(self) -> CodegraftError | None:
        """Why training cannot go on."""
        if not self._failure.exists():
            return None
        told = TrainingFailure.FromString(self._failure.read_bytes())
        return by_reason(told.reason)(told.message, field=told.field, hint=told.hint)

    def stop(self) -> None:
        """Asks the processes to end after the step they are at, and to leave a checkpoint of it."""
        self._stop.touch()

    def release(self, taken: CheckpointWritten) -> None:
        """Makes room for the next checkpoint: this one's files are kept elsewhere by now."""
        shutil.rmtree(taken.adapter_path, ignore_errors=True)
        for state in (self.path / "states").glob("*"):
            if int(state.name) < taken.step:
                shutil.rmtree(state, ignore_errors=True)

    # --- the processes' side ----------------------------------------------------------------------------------------

    def spec(self) -> TrainingSpec:
        """What to do."""
        return TrainingSpec.FromString((self.path / "spec.binpb").read_bytes())

    def open_messages(self) -> list[TrainingMessage]:
        """The messages so far; drops the rest of one whose writer was killed in it. For rank 0, once, at its start."""
        messages, end = self.read()
        os.truncate(self._messages, end)
        return messages

    def write(self, message: TrainingMessage) -> None:
        """Appends a message. For rank 0."""
        data = message.SerializeToString()
        with self._messages.open("ab") as file:
            file.write(_LENGTH.pack(len(data)) + data)

    def fail(self, error: CodegraftError) -> None:
        """Says why it cannot go on. The first rank that says so counts: the others fail of it."""
        told = TrainingFailure(reason=error.reason, message=error.message, field=error.field, hint=error.hint)
        mine = self._failure.with_suffix(f".{os.getpid()}")
        mine.write_bytes(told.SerializeToString())
        with contextlib.suppress(FileExistsError):
            os.link(mine, self._failure)  # all of it at once, and never over another one
        mine.unlink()

    def is_stopped(self) -> bool:
        """Whether the worker asks to stop."""
        return self._stop.exists()

    def waiting(self) -> int:
        """Checkpoints that the worker has not yet taken."""
        folder = self.path / "adapters"
        return len(list(folder.iterdir())) if folder.exists() else 0

    def adapter_path(self, step: int) -> Path:
        """Where the adapter of a checkpoint is to be written."""
        return self.path / "adapters" / str(step)

    def state_path(self, step: int) -> Path:
        """Where the state beside a checkpoint is to be written."""
        return self.path / "states" / str(step)
