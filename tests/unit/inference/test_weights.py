"""Packed weights against torch's own product, and whole models on them against the same model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from services.core.models.weights import quick_dtype
from services.inference.engine import attention_kernels, kernels, layers
from services.inference.engine.layers import speed_up
from services.inference.engine.scheduler import Limits
from services.inference.engine.weights import Blocked, Fast
from tests.unit.inference.tiny import Bench, greedy, marker

IN_THREADS = kernels.in_threads()
PROMPT = [5, 9, 2, 60, 33, 7, 8, 120, 44, 91]
needs_kernels = pytest.mark.skipif(not layers.packs("cpu"), reason="this processor has no such kernels")


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 3, 16, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("narrow", "error"), [(False, 0.003), (True, 0.02)])
def test_products_are_the_exact_ones_within_their_rounding(
    narrow: bool, error: float, bias: bool, tokens: int, bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(96, 64).bfloat16(), torch.randn(tokens, 64)
    offset = torch.randn(96).bfloat16() if bias else None
    exact = torch.nn.functional.linear(x, weight.float(), None if offset is None else offset.float())
    for threads in (True, False):
        monkeypatch.setattr(kernels, "in_threads", lambda threads=threads: threads and IN_THREADS)
        product = Fast(weight, offset, narrow=narrow)(x)
        assert product.dtype == torch.float32
        assert ((product - exact).norm() / exact.norm()).item() < error


@needs_kernels
@pytest.mark.skipif(quick_dtype("cpu") != torch.bfloat16, reason="this processor has no products of bfloat16")
@pytest.mark.parametrize("tokens", [1, 3, 16, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_products_in_onednn_s_order_are_the_exact_ones_within_their_rounding(bias: bool, tokens: int) -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(96, 64).bfloat16(), torch.randn(tokens, 64)
    offset = torch.randn(96).bfloat16() if bias else None
    exact = torch.nn.functional.linear(x, weight.float(), None if offset is None else offset.float())
    assert ((Blocked(weight, offset)(x) - exact).norm() / exact.norm()).item() < 0.004


@needs_kernels
@pytest.mark.parametrize("threads", [True, False])
def test_halves_lose_nothing_of_few_tokens(threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "in_threads", lambda: threads and IN_THREADS)
    torch.manual_seed(1)
    weight, x = torch.randn(96, 64).bfloat16(), torch.randn(2, 64)
    torch.testing.assert_close(Fast(weight, None, narrow=False)(x), x @ weight.float().T, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("threads", [True, False])
def test_a_token_in_eight_bits_does_not_depend_on_the_others(threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "in_threads", lambda: threads and IN_THREADS)
    torch.manual_seed(1)
    weight, x = torch.randn(96, 64).bfloat16(), torch.randn(1, 64)
    narrow, exact = Fast(weight, None, narrow=True), x @ weight.float().T
    beside_a_large_one = narrow(torch.cat([x, 1000 * torch.randn(1, 64)]))[:1]
    assert ((beside_a_large_one - exact).norm() / exact.norm()).item() < 0.02


@needs_kernels
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_a_model_on_packed_weights_computes_what_it_did(
    kind: layers.Kind, bfloat16: bool, reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    rounded = copy.deepcopy(reference).bfloat16()
    exact = copy.deepcopy(rounded).float()
    bench = Bench(rounded, tokenizer, Limits(running=4, kv_tokens=2048))
    speed_up(bench.model, kind)
    assert bench.model.dtype == torch.bfloat16, "what the keys and values are kept in"
    bench.engine.start()
    heard = bench.submit(PROMPT, 1, targets=tuple(greedy(exact, PROMPT, 1))).wait()
    changed = bench.submit(PROMPT, 8, adapter=marker(bench.model, 1)).wait()
    bench.engine.stop()
    with torch.inference_mode():
        wanted = exact(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1).max().item()
    assert heard.outputs[-1].logprobs[0].logprob == pytest.approx(wanted, abs=0.15 if bfloat16 else 0.05)
    assert changed.new != greedy(exact, PROMPT, 8)


def test_float32_stays_as_it_is(reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    bench = Bench(reference, tokenizer, Limits(running=4, kv_tokens=2048))
    before = {type(module) for module in bench.model.modules()}
    speed_up(bench.model, "int8")
    assert {type(module) for module in bench.model.modules()} == before


@needs_kernels
def test_no_step_has_to_compile(reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    bench = Bench(copy.deepcopy(reference).bfloat16(), tokenizer, Limits(running=8, kv_tokens=2048))
    speed_up(bench.model, "int8")
    used = (kernels.norm, attention_kernels.turn, attention_kernels.attend, kernels.adapt, kernels.narrow)
    kernels.warm()
    before = [list(kernel.signatures) for kernel in used]  # type: ignore[attr-defined]
    bench.engine.start()
    adapters = [None, marker(bench.model, 1), marker(bench.model, 2), marker(bench.model, 3, rank=9)]
    for count in (1, 3, 8):
        for heard in [bench.submit(PROMPT[: 3 + n], 12, adapter=adapters[n % 4]) for n in range(count)]:
            heard.wait()
    bench.engine.stop()
    assert [list(kernel.signatures) for kernel in used] == before  # type: ignore[attr-defined]
