"""Memory of this machine and of this process, as Linux tells it. All figures are bytes."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_V1 = _CGROUP / "memory"
_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")


def is_known() -> bool:
    """Whether the system tells these figures at all."""
    return _MEMINFO.exists() and _STATUS.exists()


def free() -> int:
    """What this process can still have: of the machine, of its cgroup, of its address space."""
    found = [_field(_MEMINFO, "MemAvailable")]
    for limit, used, stat in (
        (_CGROUP / "memory.max", _CGROUP / "memory.current", _CGROUP / "memory.stat"),
        (_CGROUP_V1 / "memory.limit_in_bytes", _CGROUP_V1 / "memory.usage_in_bytes", _CGROUP_V1 / "memory.stat"),
    ):
        if (most := _number(limit)) is not None and (now := _number(used)) is not None:
            found.append(most - now + _cached(stat))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        found.append(soft - _field(_STATUS, "VmSize"))
    return max(0, min(found))


def resident() -> int:
    """What this process holds now."""
    return _field(_STATUS, "VmRSS")


def peak() -> int:
    """The most that this process held since :func:`reset_peak`."""
    return _field(_STATUS, "VmHWM")


def reset_peak() -> None:
    """Begins a new peak. Where that is not allowed the peak stays the old one, and estimates err on the safe side."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _number(path: Path) -> int | None:
    """The number in a file; None when it says "max" or is not there."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _cached(stat: Path) -> int:
    """Page cache that the kernel gives back when somebody needs it."""
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.split()[0] == "inactive_file")


def _field(path: Path, field: str) -> int:
    """A line ``field: 12 kB``."""
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return 0
