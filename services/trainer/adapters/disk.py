"""Room on the disk, asked for before gigabytes are written."""

from __future__ import annotations

import shutil
from pathlib import Path

from services.core.errors import DiskFull

SPARE_BYTES = 256 << 20
"""Left alone: a full disk stops everything else on the machine."""


def check_room(folder: Path, size: int, what: str) -> None:
    """Raises DiskFull unless the folder's disk has room for so many bytes.

    Args:
        what: needs them, for the message.
    """
    free = shutil.disk_usage(folder).free
    if size + SPARE_BYTES > free:
        raise DiskFull(
            f"{what} needs {size:,} bytes of disk, and {free:,} are free",
            hint="Free some space in the trainer's CODEGRAFT_CACHE_DIR.",
            retry_after=60,
        )
