"""Documents that share a row do not see each other, in every architecture of the catalogue, on every attention path."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPTBigCodeConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Starcoder2Config,
)

from services.core import errors
from services.core.models import weights
from services.trainer.corpus.packing import Row, pack
from services.trainer.model import isolation
from services.trainer.model.lora import Trainee
from services.trainer.planning.settings import Settings

COMMON: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": None,
}
BIGCODE: dict[str, Any] = {
    "vocab_size": 258,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "llama, no groups": LlamaConfig(**{**COMMON, "num_key_value_heads": 4}),
    "qwen2": Qwen2Config(**COMMON),
    "qwen2, sliding window": Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "starcoder2": Starcoder2Config(**{**COMMON, "num_key_value_heads": 1}),
    "starcoder2, sliding window": Starcoder2Config(**COMMON, sliding_window=8),
    "granite": GraniteConfig(**COMMON, attention_multiplier=0.3, residual_multiplier=0.5, embedding_multiplier=2.0),
    "gpt_bigcode": GPTBigCodeConfig(**BIGCODE, multi_query=True),
    "gpt_bigcode, all heads": GPTBigCodeConfig(**BIGCODE, multi_query=False),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    found = {}
    for number, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(number)
        found[name] = tmp_path_factory.mktemp("model")
        AutoModelForCausalLM.from_config(config).save_pretrained(found[name])
    return found


def row(ids: list[int]) -> Row:
    return Row(ids[:-1], ids[1:], list(range(len(ids) - 1)))


def made(
    folder: Path, settings: Callable[..., Settings], attention: str, monkeypatch: pytest.MonkeyPatch, **changed: Any
) -> Trainee:
    """A trainee whose base attends in that way, with an adapter that does something."""
    original = weights.load_model

    def load(folder: Path, dtype: torch.dtype | None = None) -> Any:
        model = original(folder, dtype)
        model.set_attn_implementation(attention)
        return model

    with monkeypatch.context() as patch:
        patch.setattr(weights, "load_model", load)
        trainee = Trainee(
            folder, settings(target_modules=(), **changed), device=torch.device("cpu"), dtype=torch.float32
        )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for master in trainee.masters.values():
            master.add_(torch.randn(master.shape, generator=generator) * 0.1)
    trainee.publish()
    return trainee


DOCUMENTS = st.lists(st.lists(st.integers(0, 255), min_size=2, max_size=30), min_size=2, max_size=8)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_separate(
    name: str,
    attention: str,
    folders: dict[str, Path],
    settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainee = made(folders[name], settings, attention, monkeypatch)

    @examples(max_examples=5, deadline=None, derandomize=True)
    @given(DOCUMENTS)
    def check(documents: list[list[int]]) -> None:
        rows = pack([], 48, whole=documents)
        together = torch.cat(trainee.losses(rows))
        by_row = [ids for r in rows for ids in _documents(r)]
        apart = torch.cat([trainee.losses([row(ids)])[0] for ids in by_row])
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)

    check()


@pytest.mark.parametrize("low", [False, True], ids=["", "low memory"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["starcoder2, sliding window", "gpt_bigcode"])
def test_packed_gradients_equal_separate_ones(
    name: str,
    attention: str,
    low: bool,
    folders: dict[str, Path],
    settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainee = made(folders[name], settings, attention, monkeypatch, low_gpu_memory_mode=low)
    documents = [[n * 7 % 251 for n in range(at, at + size)] for at, size in ((3, 9), (50, 21), (7, 17), (90, 5))]
    found = []
    for rows in (pack([], 32, whole=documents), [row(ids) for ids in documents]):
        for one in rows:
            trainee.accumulate([one], 48)
        trainee.take_gradients()
        found.append({name: master.grad.clone() for name, master in trainee.masters.items() if master.grad is not None})
    assert len(found[0]) == len(trainee.masters)
    for parameter, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][parameter], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt_bigcode"])
def test_a_model_that_looks_into_other_documents_is_refused(
    name: str,
    attention: str,
    folders: dict[str, Path],
    settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainee = made(folders[name], settings, attention, monkeypatch)
    isolation.check(trainee, 258)
    tidy = trainee.losses

    def careless(rows: list[Row]) -> list[torch.Tensor]:
        """As a model does that takes a row for one text."""
        return tidy([Row(r.ids, r.labels, list(range(len(r.ids)))) for r in rows])

    monkeypatch.setattr(trainee, "losses", careless)
    with pytest.raises(errors.NotSupported) as refused:
        isolation.check(trainee, 258)
    assert refused.value.field == "base_model"


def _documents(packed: Row) -> list[list[int]]:
    starts = [n for n, position in enumerate(packed.positions) if position == 0] + [len(packed.ids)]
    return [[*packed.ids[a:b], packed.labels[b - 1]] for a, b in pairwise(starts)]
