"""A prompt's piece in bfloat16 against attention by its definition."""

from __future__ import annotations

import pytest
import torch

from services.inference.engine.attention import Step, keep, look
from services.inference.engine.rows import Row

HEADS, KV_HEADS, SIZE = 4, 2, 16


@pytest.mark.parametrize("blocks", [[2, 3, 4, 5], [5, 2, 7, 1]])
@pytest.mark.parametrize("window", [None, 24, 100])
@pytest.mark.parametrize(("past", "count"), [(0, 40), (13, 33), (30, 17)])
def test_a_piece_of_a_prompt_sees_what_is_before_it(
    past: int, count: int, window: int | None, blocks: list[int]
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
    assert ((seen.float() - exact).norm() / exact.norm()).item() < 0.01
