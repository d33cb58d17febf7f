"""Every architecture of the catalogue through the engine: transformers' own greedy tokens, cold and warm, mixed; and as
a CPU serves it, on packed weights, transformers' own logits."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTBigCodeConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)

from services.core.models import catalogue
from services.inference.engine import layers
from services.inference.engine.scheduler import Limits
from services.inference.engine.sequence import Reason, Sampling
from tests.unit.inference.tiny import Bench, Heard, Knowing, greedy, marker, merged

_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0}
CONFIGS: dict[str, PreTrainedConfig] = {
    "smollm2": LlamaConfig(num_key_value_heads=2),
    "deepseek-coder": LlamaConfig(num_key_value_heads=4, rope_parameters=_LINEAR),
    "codellama": LlamaConfig(num_key_value_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2.5-coder": Qwen2Config(num_key_value_heads=2),
    "starcoder2": Starcoder2Config(num_key_value_heads=1, sliding_window=24, use_bias=True),
    "granite-code": LlamaConfig(num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "granite-code-20b": GPTBigCodeConfig(multi_query=True),
    "granite": GraniteConfig(num_key_value_heads=4, attention_multiplier=0.3),
    "qwen3": Qwen3Config(num_key_value_heads=2, head_dim=16),
    "mistral": MistralConfig(num_key_value_heads=2, sliding_window=24, head_dim=16),
    "gemma2": Gemma2Config(
        num_key_value_heads=2, sliding_window=24, head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=3.0
    ),
}
FAMILY = random.Random(1).choices(range(256), k=85)
PROMPTS = [[5], FAMILY[:40], FAMILY, [*FAMILY[:70], 1, 2, 3], [7] * 33, FAMILY[1:80]]


def small(config: PreTrainedConfig, vocabulary: int) -> PreTrainedModel:
    """Random weights wide enough that every completion is another one."""
    torch.manual_seed(1)
    config.update({"vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.3})
    config.update({"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256})
    config.update({"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False})
    if isinstance(config, Gemma2Config):
        config.layer_types = ["sliding_attention", "full_attention"]
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases begin as 0 and norms as 1: nobody would miss one that is left out
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_transformers(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = small(CONFIGS[name], len(tokenizer))
    expected = [greedy(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS), "all alike would prove little"
    bench = Bench(model, tokenizer, Limits(running=6, step_tokens=24))
    bench.engine.start()
    cold = [bench.submit(prompt, 12).wait() for prompt in PROMPTS]
    adapter = marker(bench.model, 1)
    other = bench.submit(PROMPTS[2], 12, adapter=adapter).wait()
    mixed = [bench.submit(prompt, 12) for prompt in PROMPTS]
    again = bench.submit(PROMPTS[2], 12, adapter=adapter)
    assert [one.new for one in cold] == expected
    assert [one.wait().new for one in mixed] == expected
    assert [one.sequence.cached for one in cold] == [0, 0, 32, 64, 0, 0]
    assert [one.sequence.cached for one in mixed] == [0, 32, 80, 64, 32, 64]
    assert again.wait().new == other.new != expected[2]
    guessed = [bench.make(prompt, 12) for prompt in PROMPTS]
    for seed, (one, tokens) in enumerate(zip(guessed, expected, strict=True)):
        one.sequence.drafter = Knowing([*one.sequence.prompt, *tokens], seed)
    before = bench.engine.drafted_tokens
    bench.engine.submit(*(one.sequence for one in guessed))
    assert [one.wait().new for one in guessed] == expected
    right, drafted = (now - then for now, then in zip(bench.engine.drafted_tokens, before, strict=True))
    assert 10 < right < drafted
    bench.engine.stop()


def told(heard: Heard, size: int) -> torch.Tensor:
    """The log-probabilities of all tokens at each new one, ``[new, size]``."""
    rows = [sorted(item.top) for output in heard.outputs for item in output.logprobs]
    return torch.tensor([[logprob for _, logprob in row] for row in rows]).view(len(heard.new), size)


def computed(model: PreTrainedModel, heard: Heard, size: int) -> torch.Tensor:
    """The same by transformers."""
    with torch.inference_mode():
        logits = model(torch.tensor([heard.sequence.tokens])).logits
    return logits[0, len(heard.sequence.prompt) - 1 : -1, :size].float().log_softmax(-1)  # type: ignore[no-any-return]


@pytest.mark.skipif(not layers.packs("cpu"), reason="this processor has no such kernels")
@pytest.mark.parametrize(("kind", "most"), [("bf16", 1.5), ("int8", 2.5)])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_for_a_cpu_it_is_as_near_to_float32_as_transformers_in_bfloat16(
    name: str, kind: layers.Kind, most: float, bfloat16: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    rounded, size = small(CONFIGS[name], len(tokenizer)).bfloat16(), len(tokenizer)
    bench = Bench(rounded, tokenizer, Limits(running=6, step_tokens=48))
    layers.speed_up(bench.model, kind)
    weights = marker(bench.model, 1)
    bases = {None: rounded, weights: merged(rounded, weights)}  # type: ignore[arg-type]
    ours, theirs, exact = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
    bench.engine.start()
    for count in (1, 2, 6):  # each has its kernels; prompts of up to 48 tokens have others
        adapters = [weights if n % 2 else None for n in range(count)]
        made = [
            bench.make(prompt, 8, adapter=adapter, sampling=Sampling(logprobs=size))
            for prompt, adapter in zip(PROMPTS[-count:], adapters, strict=True)
        ]
        bench.engine.submit(*(one.sequence for one in made))
        for one, adapter in zip(made, adapters, strict=True):
            assert one.wait().reason is Reason.LENGTH
            ours.append(told(one, size))
            theirs.append(computed(bases[adapter], one, size))
            exact.append(computed(copy.deepcopy(bases[adapter]).float(), one, size))
    bench.engine.stop()
    off, usual = [(torch.cat(some) - torch.cat(exact)).norm().item() for some in (ours, theirs)]
    assert off < most * usual, f"{off / usual:.2f} times as far"


def test_every_type_that_can_be_served_is_here() -> None:
    types: set[Any] = {config.model_type for config in CONFIGS.values()}
    assert set(catalogue._TARGETS_BY_TYPE) <= types
