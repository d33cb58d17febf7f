"""bfloat16 in compiled kernels: the upper half of a float32, which numpy holds as uint16."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import overload


def wide(number: Any) -> Any:
    """The float32 that a number is, or whose upper half it is."""
    raise NotImplementedError  # see below: compiled functions take the form that is for its type


@overload(wide, strict=False)
def _wide(number: Any) -> Any:
    if isinstance(number, numba.types.Integer):
        return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    return lambda number: number
