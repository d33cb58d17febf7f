"""Fixtures over tiny.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from services.core.models.weights import quick_dtype
from services.inference.engine import kernels
from services.inference.engine.scheduler import Limits
from tests.processors import without_bfloat16
from tests.unit.inference.tiny import Bench, make_model, make_tokenizer


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
    kernels.warm()  # compiling them in a new checkout takes as long as an answer may


@pytest.fixture(params=[True, False], ids=["bfloat16", "no bfloat16"])
def bfloat16(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether the processor has products of bfloat16: the test runs as on one that has, and as on one that has not."""
    if not request.param:
        with without_bfloat16():
            yield False
    elif quick_dtype("cpu") != torch.bfloat16:
        pytest.skip("this processor has none")
    else:
        yield True


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def reference(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return make_model(tokenizer)


@pytest.fixture
def bench(reference: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Iterator[Bench]:
    made = Bench(reference, tokenizer, Limits(running=4, waiting=6, step_tokens=16, kv_tokens=2048))
    made.engine.start()
    yield made
    made.engine.stop()
    assert made.engine.blocks_held == 0, "blocks of an ended sequence are still held"
