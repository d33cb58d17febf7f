"""Attention of a step over a few tokens on a CPU, compiled; see engine/kernels.py.

Keys and values are bfloat16: the upper half of a float32, which numpy holds as uint16.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numba import prange

from services.inference.engine.bfloat16 import wide
from services.inference.engine.blocks import BLOCK
from services.inference.engine.jit import compiled, parallel


@compiled
def turn(qkv: Any, turned: int, cos: Any, sin: Any, kv: Any, slots: Any, begun: Any) -> None:
    """Turns queries and keys by their positions, in place, and puts keys and values into a layer's memory.

    Args:
        qkv: ``[tokens, heads, 2, head_dim / 2]``, float32: queries, keys, values.
        turned: heads that are turned.
        cos: and sin ``[tokens, 1, 2, head_dim / 2]``, float32, see :class:`services.inference.engine.block.Rotary`.
        kv: ``[2, kv_heads, slots, head_dim]``, bfloat16.
        slots: where each token's go, int64.
        begun: slots to be cleared, int64.
    """
    tokens, heads, _, half = qkv.shape
    kv_heads = kv.shape[1]
    queries = heads - 2 * kv_heads
    bits = qkv.view(np.uint32)
    for slot in begun:
        for head in range(2 * kv_heads):
            for at in range(2 * half):
                kv[head // kv_heads, head % kv_heads, slot, at] = 0
    for token in range(tokens):
        for head in range(turned):
            for at in range(half):
                first, second = qkv[token, head, 0, at], qkv[token, head, 1, at]
                qkv[token, head, 0, at] = first * cos[token, 0, 0, at] + second * sin[token, 0, 0, at]
                qkv[token, head, 1, at] = second * cos[token, 0, 1, at] + first * sin[token, 0, 1, at]
        for head in range(2 * kv_heads):
            for part in range(2):
                for at in range(half):
                    number = bits[token, queries + head, part, at]
                    # to the nearest, of two the even one
                    number += np.uint32(0x7FFF) + ((number >> np.uint32(16)) & np.uint32(1))
                    kv[head // kv_heads, head % kv_heads, slots[token], part * half + at] = number >> np.uint32(16)


@compiled
def _exp(x: Any) -> Any:
    """The exponential function of a float32 of at most 0, to 1.2e-7 of it; below e^-87, that. By Cephes' expf
    (netlib.org/cephes), whose loop is compiled to vectors, as a call of the C library's is not."""
    x = max(x, np.float32(-87.0))
    whole = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    rest = x - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * rest + np.float32(1.3981999507e-3)
    y = y * rest + np.float32(8.3334519073e-3)
    y = y * rest + np.float32(4.1665795894e-2)
    y = y * rest + np.float32(1.6666665459e-1)
    y = y * rest + np.float32(5.0000001201e-1)
    y = y * rest * rest + rest + np.float32(1.0)
    return y * np.uint32(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23)).view(np.float32)


@compiled
def _kept(kept: Any, table: Any, at: int) -> Any:
    """The key or value of a place in a sequence, ``[head_dim]``.

    Args:
        kept: ``[slots, head_dim]``, bfloat16.
        table: blocks of the sequence.
    """
    return kept[table[at // BLOCK] * BLOCK + at % BLOCK]


@compiled
def _score_three(keys: Any, table: Any, begin: int, end: int, queries: Any, scores: Any) -> None:
    """Products of three queries, ``[3, head_dim]``, with the keys of places, to ``[3, places]``. Each key is widened
    once, in registers."""
    query0, query1, query2 = queries[0], queries[1], queries[2]
    for at in range(begin, end):
        key = _kept(keys, table, at)
        score0, score1, score2 = np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for n in range(len(query0)):
            number = wide(key[n])
            score0 += number * query0[n]
            score1 += number * query1[n]
            score2 += number * query2[n]
        scores[0, at - begin], scores[1, at - begin], scores[2, at - begin] = score0, score1, score2


@compiled
def _score_one(keys: Any, table: Any, begin: int, end: int, query: Any, scores: Any) -> None:
    """The same of one query, four places in one pass; for places behind the last one, that one again.

    Args:
        scores: ``[places rounded up to four]``
    """
    last = end - 1
    for at in range(begin, end, 4):
        key0, key1 = _kept(keys, table, at), _kept(keys, table, min(at + 1, last))
        key2, key3 = _kept(keys, table, min(at + 2, last)), _kept(keys, table, min(at + 3, last))
        score0, score1, score2, score3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for n in range(len(query)):
            number = query[n]
            score0 += number * wide(key0[n])
            score1 += number * wide(key1[n])
            score2 += number * wide(key2[n])
            score3 += number * wide(key3[n])
        place = at - begin
        scores[place], scores[place + 1], scores[place + 2], scores[place + 3] = score0, score1, score2, score3


@compiled
def _mix_three(values: Any, table: Any, begin: int, end: int, shares: Any, seen: Any) -> None:
    """Adds the values of places to what three queries see, ``[3, head_dim]``; four places in one pass.

    Args:
        shares: ``[3, places rounded up to four]``, 0 behind the last.
    """
    last = end - 1
    share0, share1, share2 = shares[0], shares[1], shares[2]
    seen0, seen1, seen2 = seen[0], seen[1], seen[2]
    for at in range(begin, end, 4):
        value0, value1 = _kept(values, table, at), _kept(values, table, min(at + 1, last))
        value2, value3 = _kept(values, table, min(at + 2, last)), _kept(values, table, min(at + 3, last))
        place = at - begin
        share00, share01, share02, share03 = share0[place], share0[place + 1], share0[place + 2], share0[place + 3]
        share10, share11, share12, share13 = share1[place], share1[place + 1], share1[place + 2], share1[place + 3]
        share20, share21, share22, share23 = share2[place], share2[place + 1], share2[place + 2], share2[place + 3]
        for n in range(len(seen0)):
            number0, number1, number2, number3 = wide(value0[n]), wide(value1[n]), wide(value2[n]), wide(value3[n])
            seen0[n] += (share00 * number0 + share01 * number1) + (share02 * number2 + share03 * number3)
            seen1[n] += (share10 * number0 + share11 * number1) + (share12 * number2 + share13 * number3)
            seen2[n] += (share20 * number0 + share21 * number1) + (share22 * number2 + share23 * number3)


@compiled
def _mix_one(values: Any, table: Any, begin: int, end: int, shares: Any, seen: Any) -> None:
    """The same for one query, ``[head_dim]``."""
    last = end - 1
    for at in range(begin, end, 4):
        value0, value1 = _kept(values, table, at), _kept(values, table, min(at + 1, last))
        value2, value3 = _kept(values, table, min(at + 2, last)), _kept(values, table, min(at + 3, last))
        place = at - begin
        share0, share1, share2, share3 = shares[place], shares[place + 1], shares[place + 2], shares[place + 3]
        for n in range(len(seen)):
            first = share0 * wide(value0[n]) + share1 * wide(value1[n])
            seen[n] += first + (share2 * wide(value2[n]) + share3 * wide(value3[n]))


@compiled
def _softmax(scores: Any, count: int, scale: float) -> None:
    """Scores become shares, in place; those behind the last one 0."""
    scores[count:] = 0.0
    largest, total = np.float32(-np.inf), np.float32(0.0)
    for at in range(count):
        largest = max(largest, scores[at])
    for at in range(count):
        share = _exp((scores[at] - largest) * np.float32(scale))
        scores[at] = share
        total += share
    for at in range(count):
        scores[at] /= total


@compiled
def _attend(
    token: int, head: int, qkv: Any, kv: Any, tables: Any, pasts: Any, window: int, scale: float, out: Any
) -> None:
    """What one token sees through the queries of one head of keys; see :func:`attend`."""
    group = out.shape[1] // kv.shape[1]
    queries, seen = qkv[token, head * group : (head + 1) * group], out[token, head * group : (head + 1) * group]
    keys, values, table, end = kv[0, head], kv[1, head], tables[token], pasts[token] + 1
    begin = max(0, end - window)
    shares = np.empty((group, (end - begin + 3) // 4 * 4), np.float32)
    threes = group // 3 * 3
    for member in range(0, threes, 3):
        _score_three(keys, table, begin, end, queries[member : member + 3], shares[member : member + 3])
    for member in range(threes, group):
        _score_one(keys, table, begin, end, queries[member], shares[member])
    for member in range(group):
        _softmax(shares[member], end - begin, scale)
        seen[member] = 0.0
    for member in range(0, threes, 3):
        _mix_three(values, table, begin, end, shares[member : member + 3], seen[member : member + 3])
    for member in range(threes, group):
        _mix_one(values, table, begin, end, shares[member], seen[member])


@compiled
def attend(qkv: Any, kv: Any, tables: Any, pasts: Any, window: int, scale: float, out: Any) -> None:
    """What single tokens see, each in the blocks of its sequence.

    Args:
        qkv: ``[tokens, heads, head_dim]``, float32: turned queries first.
        kv: ``[2, kv_heads, slots, head_dim]``, bfloat16, theirs included.
        tables: blocks of each token's sequence, ``[tokens, blocks]``, int64.
        pasts: tokens before each, int64.
        window: tokens that each sees at most, itself included.
        out: ``[tokens, query_heads, head_dim]``, float32.
    """
    heads = kv.shape[1]
    for pair in range(out.shape[0] * heads):
        _attend(pair // heads, pair % heads, qkv, kv, tables, pasts, window, scale, out)


@parallel
def attend_in_threads(qkv: Any, kv: Any, tables: Any, pasts: Any, window: int, scale: float, out: Any) -> None:
    """As :func:`attend`, where :func:`services.inference.engine.kernels.in_threads`."""
    heads = kv.shape[1]
    for pair in prange(out.shape[0] * heads):
        _attend(pair // heads, pair % heads, qkv, kv, tables, pasts, window, scale, out)


def least() -> tuple[Any, ...]:
    """The least that :func:`attend` can be called with."""
    floats, ints = (partial(np.zeros, dtype=dtype) for dtype in (np.float32, np.int64))
    kv = np.zeros((2, 1, BLOCK, 2), np.uint16)
    return floats((1, 3, 2)), kv, ints((1, 1)), ints(1), BLOCK, 1.0, floats((1, 1, 2))


def warm() -> None:
    """Compiles those for one thread, see :func:`services.inference.engine.kernels.warm`."""
    floats, ints = (partial(np.zeros, dtype=dtype) for dtype in (np.float32, np.int64))
    kv, turns = np.zeros((2, 1, BLOCK, 2), np.uint16), floats((1, 1, 2, 1))
    turn(floats((1, 3, 2, 1)), 2, turns, turns, kv, ints(1), ints(0))
    attend(*least())
