"""What one source may cost. Every limit is counted on what was really read, never on what a header claims."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from services.core.errors import LimitExceeded

MiB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds for one source."""

    max_files: int = 1_000_000
    """Files, and members of an archive."""
    max_total_bytes: int = 16 << 30
    """Inflated bytes of all files together."""
    max_file_bytes: int = 64 * MiB
    """Larger files are left out of the listing and counted as "oversize": no filter would keep them."""
    max_ratio: int = 1000
    """Inflated bytes per compressed byte of a whole archive; code seldom reaches 20."""
    ratio_free_bytes: int = 32 * MiB
    """Inflated bytes below which the ratio is not looked at: a small archive cannot hurt."""
    max_path_bytes: int = 4096
    """Length of a path in UTF-8."""
    max_seconds: float = 1800
    """Time for reading the source."""


@dataclass(slots=True)
class Meter:
    """Counts against the limits while a source is read."""

    limits: Limits
    compressed_bytes: int = 0
    """Size of the archive; 0 for what is not compressed."""
    files: int = 0
    bytes: int = 0
    _began: float = field(default_factory=time.monotonic)

    def count_file(self) -> None:
        """Counts one file or member.

        Raises:
            LimitExceeded: there are too many, or it takes too long.
        """
        self.files += 1
        if self.files > self.limits.max_files:
            raise _exceeded(f"more than {self.limits.max_files:,} files", "INGEST_MAX_FILES")
        self.check_time()

    def check_time(self) -> None:
        """Raises LimitExceeded once reading has taken too long."""
        if time.monotonic() - self._began > self.limits.max_seconds:
            raise _exceeded(f"reading it took more than {self.limits.max_seconds:.0f} s", "INGEST_MAX_SECONDS")

    def count_bytes(self, size: int) -> None:
        """Counts inflated bytes.

        Raises:
            LimitExceeded: too many, in all or for the size of the archive.
        """
        self.bytes += size
        self.check_time()
        if self.bytes > self.limits.max_total_bytes:
            raise _exceeded(f"more than {self.limits.max_total_bytes:,} bytes", "INGEST_MAX_TOTAL_BYTES")
        if (
            self.compressed_bytes
            and self.bytes > self.limits.ratio_free_bytes
            and self.bytes > self.limits.max_ratio * self.compressed_bytes
        ):
            raise _exceeded(f"it inflates to more than {self.limits.max_ratio} times its size", "INGEST_MAX_RATIO")


def _exceeded(what: str, setting: str) -> LimitExceeded:
    return LimitExceeded(
        f"the source is over a limit: {what}", hint=f"Add a part of it, or raise CODEGRAFT_{setting} of the service."
    )
