"""The layers that train are the model's: gradients and losses as plain PEFT gives them, whatever the architecture."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    GPTBigCodeConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Starcoder2Config,
)

from services.trainer.corpus.data import Row, pack
from services.trainer.model import attention, layers
from services.trainer.model.lora import Trainee
from services.trainer.model.loss import IGNORED, summed_loss, token_losses

Make = Callable[..., Any]

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
# The base's own dropout, where there is one, is off.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON),
    "mistral": MistralConfig(**COMMON, sliding_window=50),
    "starcoder2": Starcoder2Config(**COMMON, use_bias=True, attention_dropout=0.3, residual_dropout=0.3),
    "granite": GraniteConfig(**COMMON, logits_scaling=8.0, residual_multiplier=0.5, attention_multiplier=0.3),
    "gpt_bigcode": GPTBigCodeConfig(
        vocab_size=97,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        n_inner=48,
        attn_pdrop=0.3,
        embd_pdrop=0.3,
        resid_pdrop=0.3,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,
    ),
}
DOCUMENTS = [[(7 * n + 5 * start) % 97 for n in range(length)] for start, length in ((1, 150), (2, 9), (3, 131))]
"""Packed, a document begins within a block of queries and another goes over its end."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a random model of that architecture."""

    @functools.cache
    def make(name: str) -> Path:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(name)
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases and norms, which all begin as zeros and ones
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder)
        return folder

    return make


def make_trainee(folder: Path, settings: Make, dtype: torch.dtype = torch.float32, **changed: Any) -> Trainee:
    made = Trainee(folder, settings(target_modules=(), **changed), device=torch.device("cpu"), dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for master in made.masters.values():
            master.add_(torch.randn(master.shape, generator=generator) * 0.1)
    made.publish()
    return made


def packed(documents: list[list[int]] = DOCUMENTS) -> Row:
    (row,) = pack(iter(documents), 512)
    return row


def gradients(made: Trainee, rows: list[Row]) -> tuple[float, dict[str, torch.Tensor]]:
    loss = made.accumulate(rows, 1)
    made.take_gradients()
    return loss, {name: master.grad for name, master in made.masters.items() if master.grad is not None}


def plainly(folder: Path, made: Trainee, documents: list[list[int]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Sum of the losses and gradients as transformers and PEFT have them, one document after the other."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, config)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == made.masters.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(made.masters[name])
    total = 0.0
    for ids in documents:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        loss = functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad for name, parameter in trained.items()}


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_plain_peft(name: str, low: bool, bases: Make, settings: Make) -> None:
    made = make_trainee(bases(name), settings, low_gpu_memory_mode=low)
    loss, found = gradients(made, [packed()])
    expected_loss, expected = plainly(bases(name), made, DOCUMENTS)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_do_not_see_each_other(name: str, bases: Make, settings: Make) -> None:
    made = make_trainee(bases(name), settings)
    together = made.losses([packed()])[0]
    apart = torch.cat([made.losses([packed([ids])])[0] for ids in DOCUMENTS])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_bigcode"])
def test_documents_stay_apart_in_the_attention_with_dropout(name: str, bases: Make, settings: Make) -> None:
    """Dropout on the shares is torch's kernel; of a probability that changes nothing, so that it can be compared."""
    made = make_trainee(bases(name), settings)
    base: Any = made._base
    for module in base.modules():
        for field in ("attention_dropout", "attn_dropout"):
            if hasattr(module, field):
                setattr(module, field, 1e-12)
    found, loss = [], 0.0
    for documents in ([DOCUMENTS], [[ids] for ids in DOCUMENTS]):
        loss = sum(made.accumulate([packed(part)], 1) for part in documents)
        made.drop_gradients()
        found.append(loss)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_what_is_known_takes_the_fast_way(bases: Make, settings: Make) -> None:
    """A release of transformers that renames a class would cost half the speed, and no other test would notice."""
    for name, kinds in {
        "llama": {"Linear", "LlamaMLP", "LlamaRMSNorm"},
        "qwen2": {"Linear", "Qwen2MLP", "Qwen2RMSNorm"},
        "granite": {"Linear", "GraniteMLP", "GraniteRMSNorm"},
        "starcoder2": {"Linear"},
        "gpt_bigcode": {"Linear"},
    }.items():
        base: Any = make_trainee(bases(name), settings)._base
        replaced = {type(module).__name__ for module in base.modules() if "forward" in vars(module)}
        assert replaced == kinds
        assert base.config._attn_implementation == attention.NAME


@pytest.mark.parametrize("name", ["llama", "starcoder2"])
def test_dropout_is_a_function_of_the_seed(name: str, bases: Make, settings: Make) -> None:
    """And the same in low memory mode, which draws it twice."""
    found = []
    for low in (False, False, True):
        made = make_trainee(bases(name), settings, lora_dropout=0.3, low_gpu_memory_mode=low)
        torch.manual_seed(11)
        found.append(gradients(made, [packed()])[1])
    torch.manual_seed(12)
    other = gradients(made, [packed()])[1]
    for key, gradient in found[0].items():
        assert torch.equal(gradient, found[1][key])
        torch.testing.assert_close(gradient, found[2][key], rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(gradient, other[key]) for key, gradient in found[2].items())


def test_dropout_is_peft_s(bases: Make, settings: Make) -> None:
    """With half of the adapter's inputs gone, the mean over many draws is what there is without dropout."""
    made = make_trainee(bases("llama"), settings, lora_dropout=0.5)
    module = next(m for m in made._base.modules() if isinstance(m, layers.LoraLinear))
    x = torch.randn(64, module.in_features)
    module.train()
    with torch.no_grad():
        drawn = torch.stack([module(x) for _ in range(400)]).mean(0)
        module.eval()
        plain, adapted = module.base_layer(x), module(x)
    assert float((drawn - adapted).abs().mean()) < 0.1 * float((adapted - plain).abs().mean())


@pytest.mark.parametrize("low", [False, True])
def test_the_same_step_has_the_same_bits(low: bool, bases: Make, settings: Make) -> None:
    made = make_trainee(bases("llama"), settings, torch.bfloat16, low_gpu_memory_mode=low)
    (first, one), (second, other) = (gradients(made, [packed()]) for _ in range(2))
    assert first == second
    assert all(torch.equal(gradient, other[key]) for key, gradient in one.items())


def test_bfloat16_is_near(bases: Make, settings: Make) -> None:
    for name in CONFIGS:
        exact, near = (make_trainee(bases(name), settings, dtype) for dtype in (torch.float32, torch.bfloat16))
        (loss, expected), (rounded, found) = gradients(exact, [packed()]), gradients(near, [packed()])
        assert rounded == pytest.approx(loss, rel=0.01)
        for key, gradient in expected.items():
            assert functional.cosine_similarity(gradient.flatten(), found[key].flatten(), dim=0) > 0.95, (name, key)


def test_micro_batches_add_up_in_fp32(bases: Make, settings: Make) -> None:
    made = make_trainee(bases("llama"), settings, torch.bfloat16)
    for _ in range(40):
        made.accumulate([packed(DOCUMENTS[1:2])], 1)
    small = gradients(made, [packed(DOCUMENTS[1:2])])[1]
    _, single = gradients(made, [packed(DOCUMENTS[1:2])])
    for key, gradient in single.items():
        torch.testing.assert_close(small[key], 41 * gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("tokens", [1, 128, 300])
def test_attention_is_torch_s(tokens: int, window: int | None) -> None:
    torch.manual_seed(0)
    heads, kv_heads, width = 6, 2, 8
    query, key, value = (
        torch.randn(2, tokens, count, width, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )
    first = torch.zeros(2, tokens, dtype=torch.int64)
    first[0, tokens // 3 :] = tokens // 3
    first[1, tokens - 1 :] = tokens - 1
    if window is not None:
        first = torch.maximum(first, torch.arange(tokens) - window + 1)
    visible = attention.Visible.of(first, torch.float64)
    module = torch.nn.Module()
    ours, _ = attention.attend(module, query, key, value, visible)
    keys, values = (part.repeat_interleave(heads // kv_heads, 1) for part in (key, value))
    plain = functional.scaled_dot_product_attention(query, keys, values, attn_mask=visible.mask()).transpose(1, 2)
    torch.testing.assert_close(ours, plain)
    outer = torch.randn_like(plain)
    for found, expected in zip(
        torch.autograd.grad(ours, (query, key, value), outer),
        torch.autograd.grad(plain, (query, key, value), outer),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_a_mask_of_another_shape_stays_a_mask() -> None:
    def every_other(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & ((query - key) % 2 == 0)

    found = attention.visible(
        batch_size=1,
        q_length=6,
        kv_length=6,
        device=torch.device("cpu"),
        dtype=torch.float32,
        mask_function=every_other,
    )
    assert isinstance(found, torch.Tensor)
    assert found[0, 0, 5].tolist() == [False, True, False, True, False, True]


def test_scaled_logits_have_the_loss_and_gradient_of_their_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(97, 16, generator=generator, dtype=torch.float64)
    hidden = torch.randn(21, 16, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 97, (21,), generator=generator)
    labels[3] = IGNORED
    ours, plain = (hidden.clone().requires_grad_() for _ in range(2))
    summed_loss(ours, head, labels, scale=0.125).backward()
    expected = functional.cross_entropy(plain @ head.T * 0.125, labels, ignore_index=IGNORED, reduction="sum")
    expected.backward()
    torch.testing.assert_close(ours.grad, plain.grad)
    assert token_losses(hidden, head, labels, scale=0.125).sum().item() == pytest.approx(expected.item())
