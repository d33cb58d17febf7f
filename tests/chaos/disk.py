"""A disk that is small enough to fill: a file system in memory, mounted for it, or the one that containers have."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

SHARED = Path("/dev/shm")
MOST = 1 << 30
"""Bytes: filling a larger one would take the machine's memory."""
BALLAST = "ballast"


class SmallDisk:
    """A folder on a disk of its own.

    Attributes:
        folder: on the disk.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    @contextlib.contextmanager
    def of(cls, folder: Path, size: int) -> Iterator[SmallDisk]:
        """One of so many bytes at the folder, or, without the right to mount, a folder on that of containers."""
        folder.mkdir(parents=True)
        if _mounted(folder, size):
            try:
                yield cls(folder)
            finally:
                # Lazily: a process that was killed may still be on its way out.
                subprocess.run(["umount", "--lazy", str(folder)], check=True)
            return
        total = shutil.disk_usage(SHARED).total
        assert total <= MOST, f"{SHARED} has {total >> 20} MB: these tests need the right to mount, or a container"
        elsewhere = Path(tempfile.mkdtemp(prefix="codegraft-chaos-", dir=SHARED))
        try:
            yield cls(elsewhere)
        finally:
            shutil.rmtree(elsewhere, ignore_errors=True)

    @contextlib.contextmanager
    def filled(self) -> Iterator[None]:
        """There is no room left, until the end of the block."""
        ballast = self.folder / BALLAST
        try:
            with ballast.open("wb", buffering=0) as file:
                for _ in range(10):  # others may make room just now
                    with contextlib.suppress(OSError):
                        while file.write(bytes(1 << 16)):
                            pass
                    if (free := shutil.disk_usage(self.folder).free) < os.sysconf("SC_PAGE_SIZE"):
                        break
            assert free < os.sysconf("SC_PAGE_SIZE")
            yield
        finally:
            ballast.unlink()


def _mounted(folder: Path, size: int) -> bool:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "codegraft-chaos", str(folder)]
    try:
        return subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
