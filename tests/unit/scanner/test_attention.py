"""The scanner's attention against torch's, through whole models."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from services.scanner import attention

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("tokens", [1, 2, 127, 128, 129, 300])
@pytest.mark.parametrize(
    "model",
    [
        LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=6)),
        LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
        MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=50)),
    ],
    ids=["every head its keys", "grouped heads", "sliding window"],
)
def test_it_says_what_torch_says(model: PreTrainedModel, tokens: int) -> None:
    ids = torch.randint(0, 50, (3, tokens), generator=torch.Generator().manual_seed(tokens))
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits
        attention.use(model)
        assert model.config._attn_implementation == attention.NAME
        found = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_chose_another_attention_keeps_it() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))
    model.set_attn_implementation("eager")
    attention.use(model)
    assert model.config._attn_implementation == "eager"
