"""Python's search for objects that only refer to each other."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unsearched() -> Iterator[None]:
    """Meanwhile nothing is looked for, in any thread: for what makes many objects that stay.

    To import torch and transformers makes half a million, which Python would go through again and again on the way: a
    seventh of a service's start.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
