"""Attention over bfloat16 against attention by its definition."""

from __future__ import annotations

import pytest
import torch

from services.inference.engine.attention import Step, keep, look
from services.inference.engine.attention_kernels import attend
from services.inference.engine.few import Few, bits, few
from services.inference.engine.rows import Row, batches

HEADS, KV_HEADS, SIZE = 4, 2, 16


@pytest.mark.parametrize("blocks", [[2, 3, 4, 5], [5, 2, 7, 1]])
@pytest.mark.parametrize("window", [None, 24, 100])
@pytest.mark.parametrize(("past", "count"), [(0, 40), (13, 33), (30, 17)])
def test_a_piece_of_a_prompt_sees_what_is_before_it(
    past: int, count: int, window: int | None, blocks: list[int], bfloat16: bool
) -> None:
    torch.manual_seed(1)
    end = past + count
    query, keys, values = (torch.randn(heads, end, SIZE).bfloat16() for heads in (HEADS, KV_HEADS, KV_HEADS))
    kv = torch.full((2, KV_HEADS, 8 * 16, SIZE), torch.nan, dtype=torch.bfloat16)
    for begin, row in ((0, Row(0, past, 0, blocks)), (past, Row(0, count, past, blocks))):
        step = Step([], [row], torch.tensor(row.written()), torch.tensor(row.begun()), [kv])
        span = slice(begin, begin + row.count)
        if row.count:
            keep(torch.cat([keys[:, span], values[:, span]]), kv, step)
            seen = look(query[:, span], kv, step, 0.3, window)
    at = torch.arange(end)
    mask = at[None] <= at[:, None]
    if window is not None:
        mask &= at[None] > at[:, None] - window
    of_group = [part.float().repeat_interleave(HEADS // KV_HEADS, 0) for part in (keys, values)]
    scores = (query.float() @ of_group[0].mT * 0.3).masked_fill(~mask, -torch.inf)
    exact = (scores.softmax(-1) @ of_group[1])[:, past:].transpose(0, 1)
    assert ((seen.float() - exact).norm() / exact.norm()).item() < (0.01 if bfloat16 else 1e-6)


@pytest.mark.parametrize("window", [None, 24])
def test_sequences_that_decode_see_their_own_past_only(window: int | None, bfloat16: bool) -> None:
    torch.manual_seed(1)
    rows = [Row(begin, 1, past, [2 * begin, 2 * begin + 1]) for begin, past in enumerate((17, 30, 20, 25, 31, 18))]
    kv = torch.randn(2, KV_HEADS, 12 * 16, SIZE).bfloat16()
    query = torch.randn(HEADS, len(rows), SIZE).bfloat16()
    together, alone = batches(rows, torch.device("cpu"))
    assert together and not alone
    seen = look(query, kv, Step(together, [], torch.empty(0, dtype=torch.int64), None, [kv]), 0.3, window)
    for row in rows:
        first = 0 if window is None else max(0, row.past + 1 - window)
        span = slice(row.blocks[0] * 16 + first, row.blocks[0] * 16 + row.past + 1)
        keys, values = (part[:, span].float().repeat_interleave(HEADS // KV_HEADS, 0) for part in kv)
        scores = (query[:, row.begin, None].float() @ keys.mT * 0.3).softmax(-1)
        exact = (scores @ values)[:, 0]
        assert ((seen[row.begin].float() - exact).norm() / exact.norm()).item() < (0.01 if bfloat16 else 1e-6)


def a_few(counts: tuple[int, ...]) -> tuple[Step, Few]:
    """Sequences of 17 tokens and so many more each."""
    rows = [Row(sum(counts[:n]), count, 17, [2 * n, 2 * n + 1]) for n, count in enumerate(counts)]
    kv = torch.randn(2, KV_HEADS, 6 * 16, SIZE).bfloat16()
    step = Step([], rows, torch.tensor([slot for row in rows for slot in row.written()]), None, [kv])
    return step, few(step, bits([kv]) or [], rows)


def test_the_compiled_attention_sees_what_torch_sees(bfloat16: bool) -> None:
    torch.manual_seed(1)
    step, made = a_few((1, 8, 3))
    qkv, out = torch.randn(12, HEADS + 2 * KV_HEADS, SIZE), torch.full((12, HEADS, SIZE), torch.nan)
    attend(qkv.numpy(), made.kv[0], made.tables, made.pasts, 99, 0.3, out.numpy())
    seen = look(qkv[:, :HEADS].transpose(0, 1), step.kv[0], step, 0.3, None)
    apart = 0.02 if bfloat16 else 1e-5
    torch.testing.assert_close(out, seen.float(), rtol=apart, atol=apart)


def test_many_tokens_of_one_sequence_are_left_to_torch() -> None:
    assert a_few((1, 8, 3))[1].tables is not None
    assert a_few((1, 9, 3))[1].tables is None, "its keys would be read for each of nine"
