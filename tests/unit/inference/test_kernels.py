"""The compiled kernels against torch's own operations on the same memory."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from services.inference.adapters.lora import install
from services.inference.engine import attention_kernels, kernels
from services.inference.engine.attention import Step
from services.inference.engine.block import Block, Rotary, simplify
from services.inference.engine.few import Heads, bits, few
from services.inference.engine.layers import Norm
from services.inference.engine.rows import Row, batches

IN_THREADS = kernels.in_threads()
needs_threads = pytest.mark.skipif(not IN_THREADS, reason="this machine has no threads for kernels")
SLOTS = 24 * 16


def make_block(window: int | None) -> tuple[Block, Rotary]:
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=32,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        sliding_window=window,
    )
    model = MistralForCausalLM(config).eval()
    install(model)
    simplify(model)
    (block,), rotary = model.model.layers, model.model.rotary_emb
    assert isinstance(block, Block) and isinstance(rotary, Rotary)
    return block, rotary


def test_every_thread_has_the_number_of_its_own() -> None:
    def own(count: int | None) -> tuple[int, int]:
        kernels.use(count)
        return kernels.threads(), numba.get_num_threads()

    for count in (1, 2, None, 10**6):
        with ThreadPoolExecutor(1) as thread:
            mine, numbas = thread.submit(own, count).result()
            assert mine == numbas <= numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
            assert (mine, mine) == thread.submit(own, None).result()
            assert thread.submit(own, 1).result() == (1, 1)


@pytest.mark.parametrize("threads", [pytest.param(True, marks=needs_threads), False])
@pytest.mark.parametrize(("past", "window"), [(0, 99), (1, 99), (2, 99), (15, 99), (16, 99), (50, 99), (50, 7), (3, 1)])
@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("group", [1, 2, 3, 7])
def test_what_a_token_sees_is_exact(past: int, window: int, size: float, group: int, threads: bool) -> None:
    torch.manual_seed(past)
    blocks = [3, 0, 5, 1]
    kv = torch.randn(2, 2, 6 * 16, 16).bfloat16()
    queries = 2 * group
    qkv, out = torch.randn(1, queries + 4, 16) * size, torch.full((1, queries, 16), math.nan)
    slots = [blocks[at // 16] * 16 + at % 16 for at in range(max(0, past + 1 - window), past + 1)]
    attend = attention_kernels.attend_in_threads if threads else attention_kernels.attend
    arrays = np.array([blocks]), np.array([past])
    kv[:, :, [slot for slot in range(6 * 16) if slot not in slots]] = math.nan
    attend(qkv.numpy(), kv.view(torch.uint16).numpy(), *arrays, window, 0.3, out.numpy())
    keys, values = kv[:, :, slots].double().repeat_interleave(group, 1)
    exact = (qkv[0, :queries, None].double() @ keys.mT * 0.3).softmax(-1) @ values
    torch.testing.assert_close(out[0].double(), exact[:, 0], rtol=1e-5, atol=1e-5)


def test_the_exponential_function_is_exact() -> None:
    for x in [*np.linspace(-87, 0, 3001, dtype=np.float32), np.float32(-1e-6), np.float32(-0.0)]:
        assert attention_kernels._exp(x) == pytest.approx(math.exp(x), rel=2e-7)
    for x in (np.float32(-100), np.float32(-math.inf)):
        assert attention_kernels._exp(x) == pytest.approx(math.exp(-87), rel=1e-6)


@pytest.mark.parametrize("tokens", [1, 7])
def test_norms(tokens: int) -> None:
    exact = LlamaRMSNorm(96, eps=1e-5)
    exact.weight.data.uniform_(-2, 2)
    for x in (torch.randn(1, tokens, 96), torch.randn(tokens, 96) * 1e-4):
        torch.testing.assert_close(Norm(exact)(x), exact(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [True, False])
@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([(1, 0)], id="first token"),
        pytest.param([(1, 47)], id="one"),
        pytest.param([(1, 16), (1, 3), (1, 60)], id="three"),
        pytest.param([(1, at) for at in (3, 30, 12, 17, 40, 9)], id="a batch"),
        pytest.param([(6, 28)], id="guesses"),
        pytest.param([(1, 20), (4, 28)], id="guesses beside one"),
    ],
)
@torch.inference_mode()
def test_what_tokens_see(
    rows: list[tuple[int, int]], window: int | None, threads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "in_threads", lambda: threads and IN_THREADS)
    block, rotary = make_block(window)
    begin, free, made, slots, begun, positions = 0, list(range(24)), list[Row](), list[int](), list[int](), list[int]()
    for count, past in rows:
        blocks = [free.pop(7 % len(free)) for _ in range((past + count + 15) // 16)]
        made.append(Row(begin, count, past, blocks))
        slots += made[-1].written()
        begun += made[-1].begun()
        positions += range(past, past + count)
        begin += count
    kv = torch.randn(2, 2, SLOTS, 16).bfloat16()
    kv[:, :, begun] = math.nan
    qkv = torch.randn(begin, 96 + 2 * 32)
    turns = rotary(qkv, torch.tensor([positions]))
    found = []
    for compiled in (False, True):
        memory = [kv.clone()]
        together, alone = batches([Row(row.begin, row.count, row.past, row.blocks) for row in made], kv.device)
        step = Step(together, alone, torch.tensor(slots), torch.tensor(begun) if begun else None, memory)
        if compiled:
            arrays = bits(memory)
            assert arrays is not None
            step = Step(together, alone, step.slots, step.begun, memory, few(step, arrays, made))
        if compiled:
            heads = Heads.of(qkv.clone(), seen := torch.empty(begin, 96), block.width)
            block.few(heads, (turns[0].numpy(), turns[1].numpy()), step)
        else:
            seen = block._many(qkv.clone(), turns, step)
        found.append((seen.float(), memory[0].float()))
    (wanted, kept), (seen, own) = found
    assert ((seen - wanted).norm() / wanted.norm()).item() < 0.006
    torch.testing.assert_close(own, kept, rtol=0.01, atol=1e-6)  # to a bit of bfloat16


def test_single_tokens_are_read_in_place_and_others_left_to_torch(
    bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = [torch.zeros(2, 2, SLOTS, 16, dtype=torch.bfloat16)]
    arrays = bits(memory)
    assert arrays is not None
    one, many = Row(0, 1, 20, [4, 2]), Row(1, 3, 0, [7])
    found = few(Step([], [one], torch.tensor([36]), None, memory), arrays, [one])
    assert found.tables.tolist() == [[4, 2]] and found.pasts.tolist() == [20]
    found = few(Step([], [one, many], torch.arange(4), None, memory), arrays, [one, many])
    assert found.tables.tolist() == [[4, 2], [7, 0], [7, 0], [7, 0]] and found.pasts.tolist() == [20, 0, 1, 2]
    monkeypatch.setattr(kernels, "in_threads", lambda: False)
    alone = few(Step([], [one, many], torch.arange(4), None, memory), arrays, [one, many])
    assert (alone.tables is None) == bfloat16, "torch has to have quick products for it"
    long = Row(1, 17, 0, [7, 8])
    assert few(Step([], [one, long], torch.arange(18), None, memory), arrays, [one, long]).tables is None
    assert few(Step([], [one], torch.tensor([36]), None, memory), arrays, [one]).tables is not None
    arrays[0][1, 1, 3, 5] = 0x3F80
    assert memory[0][1, 1, 3, 5] == 1.0, "another memory"
    assert bits([torch.zeros(2, 2, 16, 16)]) is None
    assert np.shares_memory(arrays[0], memory[0].view(torch.uint16).numpy())
