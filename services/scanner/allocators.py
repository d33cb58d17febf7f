"""Makes this process use memory again that was freed; importing it does so. For the first line of a program.

glibc keeps an arena for each of up to eight threads per core, and Arrow's own allocator keeps what was freed. With two
arenas and Arrow on glibc a scan of 10,000 files peaks at 520 MB instead of 660, and takes no longer.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

M_ARENA_MAX = -8
"""Of glibc's malloc.h."""

os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
if "MALLOC_ARENA_MAX" not in os.environ:
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)
