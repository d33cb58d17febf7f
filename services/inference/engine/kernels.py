"""Products and norms of a step over a few tokens on a CPU, compiled: one call for torch's dozens.

Attention's are in attention_kernels.py, how all are compiled in jit.py.

torch takes 2 to 10 microseconds for a call, and for one token that is longer than the arithmetic. These take 1 to 3.
What is worth it has a form for several threads (:func:`in_threads`), the others run in the calling one. bfloat16 is the
upper half of a float32, which numpy holds as uint16.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numba
import numpy as np
from numba import prange

from services.inference.engine import attention_kernels
from services.inference.engine.bfloat16 import wide
from services.inference.engine.jit import compiled, parallel

_SHARED = 4
"""Tokens on one adapter that read a row of it together."""


@compiled
def norm(x: Any, weight: Any, least: float, out: Any) -> None:
    """Root mean square normalization.

    Args:
        x: ``[tokens, width]``, float32, as out.
        weight: ``[width]``, float32, times the root of the width.
        least: of the norm of x, by ``hypot``.
    """
    floor = np.float32(least * least)
    for token in range(x.shape[0]):
        total = floor
        for at in range(x.shape[1]):
            total += x[token, at] * x[token, at]
        factor = np.float32(1.0) / np.float32(math.sqrt(total))
        for at in range(x.shape[1]):
            out[token, at] = x[token, at] * factor * weight[at]


@compiled
def _adapt(begin: int, end: int, x: Any, y: Any, a: Any, b: Any, owners: Any, slots: Any) -> None:
    """Tokens from begin to end; see :func:`adapt`."""
    pieces, rank, piece = b.shape[1:]
    ranks = np.empty((_SHARED, a.shape[1]), np.float32)
    while begin < end:
        slot, after = slots[begin], begin + 1
        while after < min(end, begin + _SHARED) and slots[after] == slot:
            after += 1
        if slot >= 0:
            _down(x[begin:after], a[slot], ranks)
            for part in range(pieces):
                first = owners[part] * rank
                if after - begin == _SHARED:
                    _up_shared(ranks, first, b[slot, part], y, begin, part * piece)
                    continue
                for token in range(begin, after):
                    _up(ranks[token - begin, first : first + rank], b[slot, part], y[token, part * piece :])
        begin = after


@compiled
def _down(x: Any, a: Any, ranks: Any) -> None:
    """Tokens ``[at most _SHARED, in]`` times A, ``[ranks, in]``, to ``[_SHARED, ranks]``."""
    width = x.shape[1]
    for n in range(len(a)):
        row = a[n]
        if len(x) == _SHARED:
            x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
            sum0, sum1, sum2, sum3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
            for at in range(width):
                value = wide(row[at])
                sum0 += value * x0[at]
                sum1 += value * x1[at]
                sum2 += value * x2[at]
                sum3 += value * x3[at]
            ranks[0, n], ranks[1, n], ranks[2, n], ranks[3, n] = sum0, sum1, sum2, sum3
        else:
            for token in range(len(x)):
                one, total = x[token], np.float32(0.0)
                for at in range(width):
                    total += wide(row[at]) * one[at]
                ranks[token, n] = total


@compiled
def _up(ranks: Any, b: Any, out: Any) -> None:
    """A token's ``[rank]`` times a piece of B, ``[rank, piece]``, onto ``[piece or more]``; four ranks in one pass."""
    rank, piece = b.shape
    for n in range(0, rank // 4 * 4, 4):
        weight0, weight1, weight2, weight3 = ranks[n], ranks[n + 1], ranks[n + 2], ranks[n + 3]
        row0, row1, row2, row3 = b[n], b[n + 1], b[n + 2], b[n + 3]
        for at in range(piece):
            first = weight0 * wide(row0[at]) + weight1 * wide(row1[at])
            out[at] += first + weight2 * wide(row2[at]) + weight3 * wide(row3[at])
    for n in range(rank // 4 * 4, rank):
        weight, row = ranks[n], b[n]
        for at in range(piece):
            out[at] += weight * wide(row[at])


@compiled
def _up_shared(ranks: Any, first: int, b: Any, y: Any, begin: int, at_piece: int) -> None:
    """The same of _SHARED tokens from begin on: each row of B is read once for all.

    Args:
        ranks: ``[_SHARED, ranks]``, of which those from first on are B's.
        y: the whole of :func:`adapt`'s, so that its rows are known to be without gaps; where at_piece begins the piece.
    """
    rank, piece = b.shape
    out0, out1 = y[begin, at_piece:], y[begin + 1, at_piece:]
    out2, out3 = y[begin + 2, at_piece:], y[begin + 3, at_piece:]
    for n in range(0, rank // 4 * 4, 4):
        at = first + n
        w00, w01, w02, w03 = ranks[0, at], ranks[0, at + 1], ranks[0, at + 2], ranks[0, at + 3]
        w10, w11, w12, w13 = ranks[1, at], ranks[1, at + 1], ranks[1, at + 2], ranks[1, at + 3]
        w20, w21, w22, w23 = ranks[2, at], ranks[2, at + 1], ranks[2, at + 2], ranks[2, at + 3]
        w30, w31, w32, w33 = ranks[3, at], ranks[3, at + 1], ranks[3, at + 2], ranks[3, at + 3]
        row0, row1, row2, row3 = b[n], b[n + 1], b[n + 2], b[n + 3]
        for place in range(piece):
            b0, b1, b2, b3 = wide(row0[place]), wide(row1[place]), wide(row2[place]), wide(row3[place])
            out0[place] += w00 * b0 + w01 * b1 + w02 * b2 + w03 * b3
            out1[place] += w10 * b0 + w11 * b1 + w12 * b2 + w13 * b3
            out2[place] += w20 * b0 + w21 * b1 + w22 * b2 + w23 * b3
            out3[place] += w30 * b0 + w31 * b1 + w32 * b2 + w33 * b3
    for n in range(rank // 4 * 4, rank):
        w0, w1, w2, w3 = ranks[0, first + n], ranks[1, first + n], ranks[2, first + n], ranks[3, first + n]
        row = b[n]
        for place in range(piece):
            value = wide(row[place])
            out0[place] += w0 * value
            out1[place] += w1 * value
            out2[place] += w2 * value
            out3[place] += w3 * value


@compiled
def adapt(x: Any, y: Any, a: Any, b: Any, owners: Any, slots: Any) -> None:
    """Adds to the products of layers with the same input what each token's adapter gives.

    Args:
        x: ``[tokens, in]``, float32, as y ``[tokens, outs side by side]``.
        a: ``[slots, layers * rank, in]``, float32 or bfloat16.
        b: ``[slots, pieces, rank, piece]``, the same.
        owners: the layer of each piece, int64.
        slots: each token's, int64; -1 for none, also for those that are missing at the end.
    """
    _adapt(0, len(slots), x, y, a, b, owners, slots)


@parallel
def adapt_in_threads(x: Any, y: Any, a: Any, b: Any, owners: Any, slots: Any, threads: int) -> None:
    """As :func:`adapt`, where :func:`in_threads`; for ``threads`` see :func:`narrow`."""
    for thread in prange(threads):
        _adapt(len(slots) * thread // threads, len(slots) * (thread + 1) // threads, x, y, a, b, owners, slots)


@parallel
def narrow(x: Any, weight: Any, scale: Any, bias: Any, keep: bool, out: Any, threads: int) -> None:
    """A product with weights of 8 bits; nothing else is rounded. Each weight is read once for four tokens.

    Args:
        x: ``[tokens, in]``, float32, as all but the weights.
        weight: ``[outs, in]``, int8.
        scale: ``[outs]``, of the weights.
        bias: ``[outs]``.
        keep: whether it is added to what is in out.
        out: ``[tokens, outs]``.
        threads: that compute, see :func:`threads`.
    """
    outs, width = weight.shape
    tokens = x.shape[0]
    for thread in prange(threads):
        for n in range(outs * thread // threads, outs * (thread + 1) // threads):
            row, factor, offset = weight[n], scale[n], bias[n]
            for quad in range(tokens // 4):
                x0, x1, x2, x3 = x[4 * quad], x[4 * quad + 1], x[4 * quad + 2], x[4 * quad + 3]
                sum0, sum1, sum2, sum3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
                for at in range(width):
                    value = np.float32(row[at])
                    sum0 += value * x0[at]
                    sum1 += value * x1[at]
                    sum2 += value * x2[at]
                    sum3 += value * x3[at]
                for place, total in enumerate((sum0, sum1, sum2, sum3)):
                    before = out[4 * quad + place, n] if keep else np.float32(0.0)
                    out[4 * quad + place, n] = before + total * factor + offset
            for token in range(tokens // 4 * 4, tokens):
                one, total = x[token], np.float32(0.0)
                for at in range(width):
                    total += np.float32(row[at]) * one[at]
                before = out[token, n] if keep else np.float32(0.0)
                out[token, n] = before + total * factor + offset


@parallel
def half(x: Any, weight: Any, bias: Any, keep: bool, out: Any, threads: int) -> None:
    """A product with bfloat16 weights, ``[outs, in]`` as uint16; the rest as :func:`narrow` takes it."""
    outs, width = weight.shape
    for thread in prange(threads):
        for n in range(outs * thread // threads, outs * (thread + 1) // threads):
            for token in range(x.shape[0]):
                total = np.float32(0.0)
                for at in range(width):
                    total += wide(weight[n, at]) * x[token, at]
                before = out[token, n] if keep else np.float32(0.0)
                out[token, n] = before + total + bias[n]


class _Own(threading.local):
    """What each thread has for itself."""

    threads: int | None = None


_own = _Own()


@cache
def in_threads() -> bool:
    """Whether there are threads for the kernels that want them: they need libgomp on the system."""
    # In a thread that ends with it: its team would keep the engine's from waiting actively, see engine/cores.py.
    with ThreadPoolExecutor(1) as other:
        try:
            other.submit(_warm_threads).result()
        except ValueError:  # numba's "no threading layer could be loaded"
            return False
    return True


def use(threads: int | None) -> None:
    """Gives the calling thread's products so many threads; None leaves them all cores."""
    if threads is not None:
        most = numba.config.NUMBA_NUM_THREADS if in_threads() else 1  # type: ignore[attr-defined]
        _own.threads = max(1, min(threads, most))
        numba.set_num_threads(_own.threads)


def threads() -> int:
    """Of the calling thread's products: what :func:`numba.get_num_threads` says, in a tenth of its time; 1 where there
    are none to be had."""
    if _own.threads is None:
        _own.threads = numba.get_num_threads() if in_threads() else 1
    return _own.threads


def _adapted(dtype: Any) -> tuple[Any, ...]:
    """The least that adapters can be called with, whose numbers are of a type."""
    floats, ints = (partial(np.zeros, dtype=dtype) for dtype in (np.float32, np.int64))
    return floats((1, 2)), floats((1, 2)), np.zeros((1, 1, 2), dtype), np.zeros((1, 1, 1, 2), dtype), ints(1), ints(1)


def _warm_threads() -> None:
    floats = partial(np.zeros, dtype=np.float32)
    attention_kernels.attend_in_threads(*attention_kernels.least())
    for dtype in (np.float32, np.uint16):
        adapt_in_threads(*_adapted(dtype), 1)  # type: ignore[call-arg]  # any number of arguments
    x, out, row = floats((1, 2)), floats((1, 1)), floats(1)
    narrow(x, np.zeros((1, 2), np.int8), row, row, False, out, 1)
    half(x, np.zeros((1, 2), np.uint16), row, False, out, 1)


def warm() -> None:
    """Compiles all of them, or loads what was compiled, so that no step has to."""
    floats = partial(np.zeros, dtype=np.float32)
    norm(floats((1, 2)), floats(2), 1.0, floats((1, 2)))
    attention_kernels.warm()
    for dtype in (np.float32, np.uint16):
        adapt(*_adapted(dtype))
    in_threads()
