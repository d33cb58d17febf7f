"""Files on their way in: written beside their folder, verified, and put in place at once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from codegraft.common.v1.artifact_pb2 import ArtifactFile
from services.core.errors import DigestMismatch, FailedPrecondition, InvalidArgument


class IncomingFiles:
    """Files that arrive one behind the other. Call :meth:`expect`, :meth:`write`, :meth:`finish`; then :meth:`discard`.

    Args:
        folder: where they go in the end. What else lies in it stays.
        overwrite: whether files of the same names may be replaced.

    Raises:
        FailedPrecondition: the folder holds something, and overwrite is not given.
    """

    def __init__(self, folder: Path, *, overwrite: bool) -> None:
        self._folder = folder
        if not overwrite and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FailedPrecondition(
                f"{folder} is there already", hint="Choose another folder, or allow to overwrite (--force)."
            )
        self._part = folder.absolute().with_name(f".{folder.absolute().name}.{secrets.token_hex(4)}.part")
        self._files: list[ArtifactFile] | None = None
        self._open: BinaryIO | None = None
        self.offset = 0
        """Bytes that arrived, of all files together."""

    def expect(self, files: Sequence[ArtifactFile]) -> bool:
        """Takes what is announced. False when it is not what was announced before: then nothing has arrived yet.

        Raises:
            InvalidArgument: a name that is no plain file name.
        """
        for file in files:
            if not file.path or file.path.startswith(".") or set(file.path) & set("/\\\0"):
                raise InvalidArgument(
                    f"{file.path[:200]!r} is no file name", field="files", hint="Nothing was written."
                )
        if self._files == list(files):
            return True
        arrived, self._files, self.offset = self.offset, list(files), 0
        self.discard()
        self._part.mkdir(parents=True)
        return not arrived

    def write(self, offset: int, data: bytes) -> None:
        """Takes bytes of one file.

        Raises:
            DigestMismatch: they do not continue what arrived.
        """
        begin = 0
        for file in self._files or ():
            if offset == self.offset and begin <= offset and offset + len(data) <= begin + file.size:
                if self._open is None or offset == begin:
                    self._close()
                    self._open = (self._part / file.path).open("ab")
                self._open.write(data)
                self.offset += len(data)
                return
            begin += file.size
        raise DigestMismatch(f"{len(data)} bytes at {offset} do not continue the {self.offset} that arrived")

    def finish(self) -> None:
        """Verifies everything and puts it in place.

        Raises:
            DigestMismatch: a file is not what was announced; nothing is put in place.
        """
        self._close()
        if self._files is None:
            raise DigestMismatch("the download ended before it said what it is", hint="Download it again.")
        for file in self._files:
            path = self._part / file.path
            path.touch()
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != file.sha256:
                raise DigestMismatch(
                    f"{file.path} has the SHA-256 {found}, not {file.sha256}", hint="Download it again."
                )
        if self._folder.is_dir() and any(self._folder.iterdir()):
            for file in self._files:
                os.replace(self._part / file.path, self._folder / file.path)
        else:
            with contextlib.suppress(FileNotFoundError):
                self._folder.rmdir()
            self._part.rename(self._folder)

    def discard(self) -> None:
        """Removes what was not put in place."""
        self._close()
        shutil.rmtree(self._part, ignore_errors=True)

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None
