"""The loss cache over the fake store: what was flushed is found, by the same model and window only."""

from __future__ import annotations

import math

from services.core.store import MemoryStore
from services.scanner.loss import FileLoss
from services.scanner.loss_cache import MAX_SEGMENTS, LossCache
from services.scanner.rules import Rules

MODEL = "d" * 64


async def test_what_is_flushed_is_found_again() -> None:
    store = MemoryStore()
    cache = LossCache(store, MODEL, Rules())
    cache.add("a" * 64, FileLoss(1.25, 10, 8))
    cache.add("b" * 64, FileLoss(math.nan, 1, 1))
    assert await LossCache(store, MODEL, Rules()).load() == {}
    await cache.flush()
    await cache.flush()
    found = await LossCache(store, MODEL, Rules(max_loss=1.0, min_tokens=5)).load()
    assert found["a" * 64] == FileLoss(1.25, 10, 8)
    assert math.isnan(found["b" * 64].loss) and found["b" * 64].tokens == 1
    assert len(store.data) == 1


async def test_another_model_or_window_is_another_cache() -> None:
    store = MemoryStore()
    cache = LossCache(store, MODEL, Rules())
    cache.add("a" * 64, FileLoss(1.0, 10, 10))
    await cache.flush()
    for model, rules in (
        ("e" * 64, Rules()),
        (MODEL, Rules(window_tokens=256)),
        (MODEL, Rules(max_tokens_per_file=100)),
    ):
        assert await LossCache(store, model, rules).load() == {}


async def test_many_segments_become_one_and_nothing_is_lost() -> None:
    store = MemoryStore()
    expected = {}
    for number in range(MAX_SEGMENTS + 1):
        cache = LossCache(store, MODEL, Rules())
        expected[f"{number:064x}"] = FileLoss(float(number), number, number)
        cache.add(f"{number:064x}", FileLoss(float(number), number, number))
        await cache.flush()
    await LossCache(store, MODEL, Rules()).compact()
    assert len(store.data) == 1
    assert await LossCache(store, MODEL, Rules()).load() == expected


async def test_a_damaged_segment_is_left_out() -> None:
    store = MemoryStore()
    for sha256 in ("a" * 64, "b" * 64):
        cache = LossCache(store, MODEL, Rules())
        cache.add(sha256, FileLoss(1.0, 10, 10))
        await cache.flush()
    key = sorted(store.data)[0]
    store.data[key] = store.data[key][:-7] + b"garbage"
    assert len(await LossCache(store, MODEL, Rules()).load()) == 1
