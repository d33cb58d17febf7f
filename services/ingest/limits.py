"""What one source may cost. Every limit is counted on what was really read, never on what a header claims."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from services.core.errors import Cancelled, LimitExceeded
from services.core.quota.places import Room

MiB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds for one source."""

    max_files: int = 1_000_000
    """Files, members of an archive, entries of a repository's tree."""
    max_total_bytes: int = 16 << 30
    """Inflated bytes of all files together; also what a clone or a download may take on disk."""
    max_file_bytes: int = 16 * MiB
    """Larger files are left out of the listing and counted as "oversize": no filter would keep them."""
    max_ratio: int = 200
    """Inflated bytes per compressed byte, looked at all the time while inflating; code seldom reaches 20."""
    ratio_free_bytes: int = 32 * MiB
    """Inflated bytes below which the ratio is not looked at: so little cannot hurt."""
    max_path_bytes: int = 4096
    """Length of a path in UTF-8."""
    max_depth: int = 100
    """Folders above a file."""
    max_seconds: float = 1800
    """Time for reading the source."""


@dataclass(slots=True)
class Meter:
    """Counts against the limits while one source is read, in whatever thread; the reader's way to stop and to tell."""

    limits: Limits = field(default_factory=Limits)
    stop: threading.Event = field(default_factory=threading.Event)
    """Set by who wants the reading to end."""
    tell: Callable[[str, int, int], None] = lambda message, done, total: None
    """Takes what is being done, how much of it is done, and of how much (0 when unknown)."""
    files: int = 0
    bytes: int = 0
    compressed: int = 0
    """Compressed bytes that were fed to a decompressor so far; 0 for what is not compressed."""
    room: Room | None = None
    """What a quota has left for the source; None for any number of bytes."""
    _began: float = field(default_factory=time.monotonic)

    def count_file(self) -> None:
        """Counts one file, member or entry.

        Raises:
            LimitExceeded: there are too many, or it takes too long.
        """
        self.files += 1
        self.check_files(self.files)
        self.check_time()

    def check_files(self, count: int) -> None:
        """Raises LimitExceeded when so many files are more than a source may have."""
        if count > self.limits.max_files:
            raise _exceeded(f"more than {self.limits.max_files:,} files", "INGEST_MAX_FILES")

    def check_time(self) -> None:
        """Raises LimitExceeded once reading has taken too long, Cancelled once it is no longer wanted."""
        if self.stop.is_set():
            raise Cancelled("reading the source was stopped")
        if time.monotonic() - self._began > self.limits.max_seconds:
            raise _exceeded(f"reading it took more than {self.limits.max_seconds:.0f} s", "INGEST_MAX_SECONDS")

    def anew(self) -> Meter:
        """One that begins to count anew."""
        return Meter(self.limits, self.stop, self.tell, room=self.room)

    @property
    def seconds_left(self) -> float:
        """Time until check_time raises."""
        return max(0.0, self._began + self.limits.max_seconds - time.monotonic())

    def count_bytes(self, size: int) -> None:
        """Counts inflated bytes.

        Raises:
            LimitExceeded: too many, in all or for what they were inflated from.
        """
        self.bytes += size
        self.check_time()
        self.check_size(self.bytes)
        if (
            self.compressed
            and self.bytes > self.limits.ratio_free_bytes
            and self.bytes > self.limits.max_ratio * self.compressed
        ):
            raise _exceeded(f"it inflates to more than {self.limits.max_ratio} times its size", "INGEST_MAX_RATIO")

    def check_size(self, size: int) -> None:
        """Raises LimitExceeded when so many bytes are more than a source may have, QuotaExceeded without room."""
        if self.room is not None:
            self.room.check(size)
        if size > self.limits.max_total_bytes:
            raise _exceeded(f"more than {self.limits.max_total_bytes:,} bytes", "INGEST_MAX_TOTAL_BYTES")


def _exceeded(what: str, setting: str) -> LimitExceeded:
    return LimitExceeded(
        f"the source is over a limit: {what}", hint=f"Add a part of it, or raise CODEGRAFT_{setting} of the service."
    )
