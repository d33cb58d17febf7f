"""The compiled step against the same model's step by torch, on the same packed weights."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from services.inference.adapters.lora import Weights
from services.inference.engine import compiled, kernels, layers
from services.inference.engine.scheduler import Limits
from services.inference.engine.sequence import Sampling
from services.inference.engine.weights import Rows8
from tests.unit.inference.tiny import Bench, marker

pytestmark = pytest.mark.usefixtures("bfloat16")
needs_kernels = pytest.mark.skipif(
    not layers.packs("cpu") or not kernels.in_threads(), reason="this machine has no such kernels"
)
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


def qwen(vocabulary: int) -> PreTrainedModel:
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, **SIZES))
    for layer in model.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            part.bias.data.normal_()
    return model


def mistral(vocabulary: int) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(vocab_size=vocabulary, sliding_window=12, **SIZES))


Told = list[list[tuple[int, float]]]
"""Tokens and their log probabilities, by stream."""


def run(bench: Bench, adapters: list[Weights | None]) -> Told:
    """One, two and four streams, with guesses."""
    told: Told = []
    bench.engine.start()
    for count in (1, 2, 4):
        made = [
            bench.make([5, 9, 2, 60, 33, 9, 2][: 3 + n], 24, adapter=adapters[n], sampling=Sampling(logprobs=0))
            for n in range(count)
        ]
        bench.engine.submit(*(heard.sequence for heard in made))
        for heard in made:
            heard.wait()
            told.append([(one.token, one.logprob) for output in heard.outputs for one in output.logprobs])
    bench.engine.stop()
    return told


@needs_kernels
@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "bf16"), ("llama", "int8"), ("qwen", "bf16"), ("mistral", "int8")]
)
def test_it_computes_what_torch_does(
    family: str,
    kind: layers.Kind,
    reference: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(2)
    model: PreTrainedModel = copy.deepcopy(reference)
    if family != "llama":
        model = {"qwen": qwen, "mistral": mistral}[family](reference.config.vocab_size)
    calls, logits = list[int](), compiled.Compiled.logits
    monkeypatch.setattr(
        compiled.Compiled, "logits", lambda self, ids, *rest: calls.append(len(ids)) or logits(self, ids, *rest)
    )
    told = list[Told]()
    for compile in (True, False):
        bench = Bench(model.eval().bfloat16(), tokenizer, Limits(running=4, kv_tokens=2048, draft_tokens=2))
        layers.speed_up(bench.model, kind)
        assert compiled.fits(bench.model)
        monkeypatch.setattr("services.inference.engine.runner.fits", lambda model, compile=compile: compile)
        adapters = [marker(bench.model, 1), None, marker(bench.model, 2, rank=9), None]
        told.append(run(bench, adapters))
    assert {1, 2, 4} <= set(calls) and max(calls) > Rows8.most, "by the kernels and by oneDNN"
    for ours, theirs in zip(*told, strict=True):
        same = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a[0] != b[0]), len(ours))
        assert same >= 4, "a near tie may go either way, but not at once"
        for (_, one), (_, other) in zip(ours[:same], theirs[:same], strict=True):
            assert one == pytest.approx(other, abs=0.1)


@needs_kernels
def test_a_probe_is_compiled_too_and_says_what_steps_compute_which_go_on_meanwhile(
    reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(copy.deepcopy(reference).bfloat16(), tokenizer, Limits(running=4, kv_tokens=2048))
    layers.speed_up(bench.model, "bf16")
    threads, logits = list[str](), compiled.Compiled.logits
    monkeypatch.setattr(
        compiled.Compiled,
        "logits",
        lambda self, *given: threads.append(threading.current_thread().name) or logits(self, *given),
    )
    bench.engine.start()
    weights, ids = marker(bench.model, 1), list(range(5, 21))
    scored = bench.submit(ids[:-1], 0, targets=tuple(ids[1:]), adapter=weights).wait().outputs[-1].logprobs
    for n in (2, 3):
        bench.submit([7, n], 240, adapter=marker(bench.model, n))
    probed = [bench.runner.probe(weights, ids) for _ in range(5)]
    assert sum(bench.engine.load) == 2, "they have ended before"
    bench.engine.stop()
    assert threads.count(threading.current_thread().name) == 5 and "engine" in threads
    assert all(torch.equal(probed[0], one) for one in probed[1:])
    losses = probed[0].float().log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    assert losses.tolist() == pytest.approx([one.logprob for one in scored], abs=0.1)
    assert not torch.equal(probed[0], bench.runner.probe(marker(bench.model, 2), ids)), "another adapter's"


@needs_kernels
def test_before_each_layer_it_is_asked_whether_others_need_cores(
    reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(copy.deepcopy(reference).bfloat16(), tokenizer, Limits(draft_tokens=0), threads=2)
    layers.speed_up(bench.model, "bf16")
    steps, asked, logits = list[None](), list[None](), compiled.Compiled.logits
    monkeypatch.setattr(bench.runner._pace, "crowded", lambda: asked.append(None) or 0)
    monkeypatch.setattr(compiled.Compiled, "logits", lambda self, *given: steps.append(None) or logits(self, *given))
    bench.engine.start()
    bench.submit([1, 2, 3], 4).wait()
    bench.engine.stop()
    assert len(steps) == 4 and len(asked) == 4 * bench.model.config.num_hidden_layers


@needs_kernels
def test_only_a_model_that_is_all_of_it_is_compiled(
    reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    def packed() -> PreTrainedModel:
        bench = Bench(copy.deepcopy(reference).bfloat16(), tokenizer, Limits(running=4, kv_tokens=2048))
        layers.speed_up(bench.model, "int8")
        return bench.model

    assert compiled.fits(packed())
    assert not compiled.fits(Bench(reference, tokenizer, Limits(running=4, kv_tokens=2048)).model), "float32"
    gelu = packed()
    gelu.model.layers[1].is_silu = False
    plain = packed()
    plain.model.norm = reference.model.norm
    assert not compiled.fits(gelu) and not compiled.fits(plain)
