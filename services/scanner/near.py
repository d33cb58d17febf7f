"""Signatures of texts, whose rows agree as often as the texts' word 5-grams do: MinHash for near-duplicates.

As in BigCode's recipe (The Stack, arXiv:2211.15533, and StarCoder, arXiv:2305.06161) a text is its set of five-word
shingles, two texts are near-duplicates when the Jaccard similarity of their sets is at least 0.7, and 256 rows of
MinHash estimate it. Words are runs of letters, digits, underscores and whatever is not ASCII, in the case they are
written in; other characters only divide them (BigCode's also divide at what is not ASCII, and take the nothing between
two of them for a word). A text of fewer than five words is one shingle of them all; a text without words has no shingle
and no near-duplicate.

Everything is the same in every process and on every machine. The rows follow Fast Similarity Sketching (Dahlgaard,
Knudsen and Thorup, arXiv:1704.04370): each shingle is taken a few times and not once a row, and texts of 20 to 1,000
shingles, as most files are, come out better than with plain MinHash, whose error has a standard deviation of 0.03; here
it is 0.02.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import rensa
from numpy.typing import NDArray

THRESHOLD = 0.7
ROWS = 256
SHINGLE_WORDS = 5
EMPTY = 0xFFFFFFFF
"""Every row of the signature of a text without words."""
MIN_FOUND = 0.8
"""The least share of the pairs right at the threshold that the bands must bring together."""

_SEED = 42
_BATCH_BYTES = 1 << 18
"""So much text at once stays in the processor's cache through all steps."""
_BATCH_TEXTS = 128
"""rensa takes several threads from 256 texts on, but the worker processes already fill the machine."""
_LONG_WORD = 64
"""Bytes; longer words are rare, and each step over eight bytes of a word costs the same for one as for thousands."""

_ODD = np.uint64(0xFF51AFD7ED558CCD)
_ODD_2 = np.uint64(0xC4CEB9FE1A85EC53)
_HALF = np.uint64(32)
_WORD_BYTES = bytes(code >= 0x80 or chr(code).isalnum() or code == ord("_") for code in range(256))
_FIRST_BYTES = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)


@dataclass(frozen=True, slots=True)
class Bands:
    """A division of the rows: texts whose signatures agree in a whole band are worth comparing."""

    count: int
    rows: int
    """In each band."""

    def found(self, similarity: float) -> float:
        """The share of the pairs with a similarity that agree in some band."""
        return 1.0 - (1.0 - similarity**self.rows) ** self.count

    def keys(self, signatures: NDArray[np.uint32]) -> NDArray[np.uint64]:
        """The bands of signatures `[texts, ROWS]` as one number each, `[texts, count]`."""
        parts = signatures[:, : self.count * self.rows].reshape(len(signatures), self.count, self.rows)
        keys = np.zeros(parts.shape[:2], np.uint64)
        for row in range(self.rows):
            _stir(keys, parts[:, :, row].astype(np.uint64))
        return keys


def bands(threshold: float) -> Bands:
    """The bands with the most rows, hence the fewest needless comparisons, that still find most pairs."""
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold {threshold} is not in (0, 1]")
    usable = (Bands(ROWS // rows, rows) for rows in range(ROWS, 0, -1))
    return next((some for some in usable if some.found(threshold) >= MIN_FOUND), Bands(ROWS, 1))


def similarity(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> NDArray[np.float64]:
    """The estimated Jaccard similarity of the texts of two signatures `[ROWS]`, or of pairs `[..., ROWS]`.

    Texts without words are similar to none.
    """
    shared: NDArray[np.float64] = np.mean((a == b) & (a != EMPTY), axis=-1)
    return shared


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """The signatures of texts, `[texts, ROWS]`."""
    found = np.empty((len(texts), ROWS), np.uint32)
    done = 0
    for batch in _batches(texts):
        hashes, ends = shingles(batch)
        offsets = np.concatenate(([0], ends)).astype(np.uint64)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, ROWS, _SEED)
        found[done : done + len(batch)] = matrix.to_rows()
        done += len(batch)
    return found


def shingles(texts: Sequence[bytes]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The hashes of the shingles of UTF-8 texts, one text after the other and in order, and where each text's end."""
    data = b"\n".join(texts)
    starts, hashes = _words(data)
    words = np.diff(np.searchsorted(starts, np.cumsum([len(text) + 1 for text in texts])), prepend=0)
    # Four words of nothing behind every text: then each of its words begins a shingle, and of those a short text keeps
    # the first and a longer one the ones without padding.
    padding = SHINGLE_WORDS - 1
    text_of = np.repeat(np.arange(len(texts)), words)
    padded = np.zeros(len(hashes) + padding * (len(texts) + 1), np.uint64)
    padded[np.arange(len(hashes)) + padding * text_of] = hashes
    mixed = padded[: len(padded) - padding].copy()
    for offset in range(1, SHINGLE_WORDS):
        _stir(mixed, padded[offset : len(padded) - padding + offset])
    kept = np.where(words > padding, words - padding, np.minimum(words, 1))
    ends = np.cumsum(kept)
    begins = np.cumsum(words + padding) - (words + padding)
    return mixed[np.arange(kept.sum()) + np.repeat(begins - (ends - kept), kept)], ends


def _batches(texts: Sequence[str]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for text in texts:
        batch.append(text.encode("utf-8", "surrogatepass"))
        size += len(batch[-1])
        if size >= _BATCH_BYTES or len(batch) == _BATCH_TEXTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _words(data: bytes) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Where the words begin, and their hashes: eight bytes of every word at a time."""
    inside = np.frombuffer(b"\0" + data.translate(_WORD_BYTES) + b"\0", np.bool_)
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, lengths = edges[0::2], edges[1::2] - edges[0::2]
    eights = np.frombuffer(data + bytes(16 + -len(data) % 8), "<u8")
    hashes = lengths.astype(np.uint64) * _ODD_2
    chosen = np.arange(len(starts))
    for offset in range(0, _LONG_WORD, 8):
        chosen = chosen[lengths[chosen] > offset]
        if not len(chosen):
            break
        block, shift = np.divmod(starts[chosen] + offset, 8)
        bits = (shift * 8).astype(np.uint64)
        # Two shifts, as one by 64 is undefined.
        value = eights[block] >> bits | eights[block + 1] << (np.uint64(63) - bits) << np.uint64(1)
        value &= _FIRST_BYTES[np.minimum(lengths[chosen] - offset, 8)]
        part = hashes[chosen]
        _stir(part, value)
        hashes[chosen] = part
    for word in np.flatnonzero(lengths > _LONG_WORD):
        content = data[starts[word] : starts[word] + lengths[word]]
        hashes[word] = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    return starts, hashes


def _stir(hashes: NDArray[np.uint64], values: NDArray[np.uint64]) -> None:
    """Takes values into hashes, in place and depending on the order."""
    hashes ^= values
    hashes *= _ODD
    hashes ^= hashes >> _HALF
