"""What is accepted of an adapter's values."""

from __future__ import annotations

import pytest
import torch

from services.core.errors import AdapterRejected
from services.core.models.adapter_files import pair_up

LAYERS = {"layer": (8, 6)}


def pairs(dtype: torch.dtype, value: float) -> dict[str, torch.Tensor]:
    tensors = {
        "base_model.model.layer.lora_A.weight": torch.ones(2, 6, dtype=dtype),
        "base_model.model.layer.lora_B.weight": torch.ones(8, 2, dtype=dtype),
    }
    tensors["base_model.model.layer.lora_B.weight"][5, 1] = value
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_no_number_is_enough(dtype: torch.dtype, value: float) -> None:
    with pytest.raises(AdapterRejected, match=r"lora_B\.weight has values that are not finite"):
        pair_up(pairs(dtype, value), name="a", rank=2, layers=LAYERS, base_model="b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_largest_numbers_are_numbers(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for value in (largest, -largest):
        tensors = pairs(dtype, value)
        assert pair_up(tensors, name="a", rank=2, layers=LAYERS, base_model="b")["layer"][1][5, 1] == value
