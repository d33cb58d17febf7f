"""Content that is still arriving: a file that grows, hashed and read by others while it does."""

from __future__ import annotations

import hashlib
import io
import threading
from pathlib import Path
from typing import BinaryIO, cast

from services.core import disk
from services.core.errors import Cancelled, UploadMismatch


class Arriving:
    """A spool file of which a beginning may be there from an earlier call.

    One thread appends, another reads behind it. The reader gets the last byte only when the whole is verified, so that
    an object store that is fed from it never stores wrong bytes.
    """

    def __init__(self, path: Path, size: int, sha256: str) -> None:
        self._path = path
        self._size = size
        self._sha256 = sha256
        self._changed = threading.Condition()
        self._broken = False
        self._verified = False
        self._hash = hashlib.sha256()
        with disk.writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)  # what the disk did not take must not follow later
        self.arrived = self._file.tell()
        with path.open("rb") as file:
            while data := file.read(1 << 20):
                self._hash.update(data)

    def append(self, data: bytes) -> None:
        """Adds bytes at the end.

        Raises:
            DiskFull: as far as there was room, they are there.
        """
        left = memoryview(data)
        while left:
            with disk.writing(self._path.parent):
                written = self._file.write(left)
            self._hash.update(left[:written])
            left = left[written:]
            with self._changed:
                self.arrived += written
                self._changed.notify_all()

    def verify(self) -> None:
        """Lets the reader have the end.

        Raises:
            UploadMismatch: the whole is not what was announced; it is thrown away.
        """
        found = self._hash.hexdigest()
        if found != self._sha256:
            self.give_up()
            self._path.unlink(missing_ok=True)
            raise UploadMismatch(
                f"the content has the SHA-256 {found}, not {self._sha256}",
                field="header.sha256",
                hint="Send it again from the start.",
            )
        with self._changed:
            self._verified = True
            self._changed.notify_all()

    def give_up(self) -> None:
        """Ends the reader with Cancelled; what arrived stays in the file, unless it is verified."""
        with self._changed:
            self._broken = not self._verified
            self._changed.notify_all()
        self._file.close()

    def reader(self) -> BinaryIO:
        """A stream of the whole content; waits for what has not arrived."""
        return cast(BinaryIO, _Reader(self))

    def wait_for(self, position: int, size: int) -> int:
        """How many of the bytes from the position on may be read; waits for at least all of them, or the end."""
        with self._changed:
            wanted = min(position + size, self._size)
            self._changed.wait_for(
                lambda: self._broken or (self.arrived >= wanted and (wanted < self._size or self._verified))
            )
            if self._broken:
                raise Cancelled("the upload broke off")
            return wanted - position

    @property
    def path(self) -> Path:
        """The spool file."""
        return self._path


class _Reader(io.RawIOBase):
    def __init__(self, content: Arriving) -> None:
        self._content = content
        self._position = 0
        self._file: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        available = self._content.wait_for(self._position, 1 << 40 if size < 0 else size)
        if self._file is None:
            self._file = self._content.path.open("rb")
        data = self._file.read(available) if available else b""
        self._position += len(data)
        return data

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()
