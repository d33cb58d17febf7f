"""How the kernels of a CPU are compiled: by numba, for the processor, when each is first called.

That takes 7 seconds in all. It is kept beside the kernels' files or, where that cannot be written, in the user's cache
folder (NUMBA_CACHE_DIR names another).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from numba import njit

Kernel = TypeVar("Kernel", bound=Callable[..., Any])
_EXACT = {"reassoc", "contract", "nsz", "arcp"}
"""What the compiler may do with floats: sum in another order, but minus infinity and NaN stay what they are."""

numba.config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]
"""It starts a product in 2 microseconds; numba's own threads take 50."""


def compiled(function: Kernel, **options: Any) -> Kernel:
    """In the calling thread, without the interpreter's lock."""
    try:
        return cast(Kernel, njit(fastmath=_EXACT, nogil=True, cache=True, **options)(function))
    except RuntimeError:  # no folder can be written
        return cast(Kernel, njit(fastmath=_EXACT, nogil=True, **options)(function))


def parallel(function: Kernel) -> Kernel:
    """In as many threads as numba.set_num_threads said in the calling one, where kernels.in_threads says so."""
    return compiled(function, parallel=True)
