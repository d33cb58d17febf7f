"""Attention of a step over a few tokens on a CPU, compiled; see engine/kernels.py.

Keys and values are bfloat16: the upper half of a float32, which numpy holds as uint16.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numba import prange

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
def _widen(kept: Any, table: Any, begin: int, last: int, rows: Any) -> None:
    """Four neighbouring keys or values of one head as float32; for those behind the last one it again.

    Args:
        kept: ``[slots, head_dim]``, bfloat16.
        table: blocks of the sequence.
        rows: ``[4, head_dim]``, uint32.
    """
    for place in range(4):
        at, row = min(begin + place, last), rows[place]
        found = kept[table[at // BLOCK] * BLOCK + at % BLOCK]
        for n in range(len(row)):
            row[n] = np.uint32(found[n]) << np.uint32(16)


@compiled
def _attend(
    token: int, head: int, qkv: Any, kv: Any, tables: Any, pasts: Any, window: int, scale: float, out: Any
) -> None:
    """What one token sees through the queries of one head of keys, four keys at a time; see :func:`attend`."""
    head_dim = out.shape[2]
    group = out.shape[1] // kv.shape[1]
    rows = np.empty((4, head_dim), np.float32)
    row0, row1, row2, row3 = rows[0], rows[1], rows[2], rows[3]
    bits, table = rows.view(np.uint32), tables[token]
    end = pasts[token] + 1
    begin = max(0, end - window)
    count = end - begin
    shares = np.empty((group, (count + 3) // 4 * 4), np.float32)
    for at in range(0, count, 4):
        _widen(kv[0, head], table, begin + at, end - 1, bits)
        for member in range(group):
            query = qkv[token, head * group + member]
            score0, score1, score2, score3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
            for n in range(head_dim):
                number = query[n]
                score0 += number * row0[n]
                score1 += number * row1[n]
                score2 += number * row2[n]
                score3 += number * row3[n]
            own = shares[member]
            own[at], own[at + 1], own[at + 2], own[at + 3] = score0, score1, score2, score3
    for member in range(group):
        own = shares[member]
        own[count:] = 0.0
        largest = np.float32(-np.inf)
        for at in range(count):
            largest = max(largest, own[at])
        total = np.float32(0.0)
        for at in range(count):
            share = _exp((own[at] - largest) * np.float32(scale))
            own[at] = share
            total += share
        for at in range(count):
            own[at] /= total
        out[token, head * group + member] = 0.0
    for at in range(0, count, 4):
        _widen(kv[1, head], table, begin + at, end - 1, bits)
        for member in range(group):
            seen, own = out[token, head * group + member], shares[member]
            share0, share1, share2, share3 = own[at], own[at + 1], own[at + 2], own[at + 3]
            for n in range(head_dim):
                seen[n] += (share0 * row0[n] + share1 * row1[n]) + (share2 * row2[n] + share3 * row3[n])


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
