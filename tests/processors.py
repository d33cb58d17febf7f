"""Processors that have no products of bfloat16, on any that has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from services.core.models.weights import quick_dtype


@contextmanager
def without_bfloat16() -> Iterator[None]:
    """As if this one had none: what is loaded and packed within is for such a processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        quick_dtype.cache_clear()
        yield
    quick_dtype.cache_clear()
