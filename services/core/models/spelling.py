"""What text each token stands for, and which tokens can spell a given text (a prompt's overhang). Imports no torch."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Overhang:
    """What a completion still has to repeat of its prompt before anything new comes; nothing by default."""

    left: bytes = b""
    ids: tuple[int, ...] = ()
    """How the tokenizer spells it or its begin; none once it is spelled otherwise."""

    @classmethod
    def of(cls, text: str, ids: Sequence[int], vocabulary: Sequence[bytes]) -> Overhang:
        """A prompt's.

        Args:
            ids: how the tokenizer spells the text; what goes beyond it is no matter.
            vocabulary: bytes of every token id.
        """
        left = text.encode()
        return cls(left, within(vocabulary, left, ids))

    def after(self, token: int, data: bytes) -> tuple[Overhang, bytes]:
        """What is left of it behind a token, and what is new of the token's bytes."""
        size = min(len(data), len(self.left))
        if data[:size] != self.left[:size]:
            return Overhang(), data  # a vocabulary that cannot spell it: go on from here
        return Overhang(self.left[size:], self.ids[1:] if self.ids[:1] == (token,) else ()), data[size:]


class Spelling:
    """Token ids by their bytes.

    Args:
        vocabulary: bytes of every token id (:func:`token_bytes`); tokens without text spell nothing.
    """

    def __init__(self, vocabulary: Sequence[bytes]) -> None:
        self.size = len(vocabulary)
        """Token ids that there are; a model may have more embeddings than that (Qwen2.5 pads them)."""
        self.vocabulary = vocabulary
        self._ids: dict[bytes, list[int]] = {}
        for number, data in enumerate(vocabulary):
            if data:
                self._ids.setdefault(data, []).append(number)
        self._sorted = sorted(self._ids)

    def beginning(self, overhang: Overhang) -> list[int]:
        """Ids of the tokens that begin what is left or that it begins; empty when none does, or nothing is left.

        Of blanks the tokenizer's own next one is the only one that is shorter: it groups them, and one by one they are
        nothing that the model has seen.
        """
        text, ids = overhang.left, overhang.ids
        if not text:
            return []
        found = [number for size in range(1, len(text)) for number in self._ids.get(text[:size], ())]
        if ids and text.isspace():
            found = [number for number in found if number == ids[0]]
        at = bisect_left(self._sorted, text)
        while at < len(self._sorted) and self._sorted[at].startswith(text):
            found += self._ids[self._sorted[at]]
            at += 1
        return found


def within(vocabulary: Sequence[bytes], text: bytes, ids: Sequence[int]) -> tuple[int, ...]:
    """The first of these ids, as far as they spell the text or its begin."""
    size = 0
    for count, number in enumerate(ids):
        data = vocabulary[number]
        if not data or text[size : size + len(data)] != data:
            return tuple(ids[:count])
        size += len(data)
    return tuple(ids)


def token_bytes(tokenizer: Any) -> list[bytes]:
    """Bytes of each token id of a transformers tokenizer (fast), so that text can be put together incrementally.

    Byte-level vocabularies (GPT-2's mapping of bytes to characters), SentencePiece ones (``▁`` is a space, ``<0x0A>`` a
    byte) and plain words are told apart by the tokenizer's own decoder. Markers have no text.
    """
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"], ensure_ascii=False)
    byte_level, sentence_piece = '"ByteLevel"' in decoder, '"ByteFallback"' in decoder or "▁" in decoder
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added: set[str] = set(tokenizer.get_added_vocab())
    special: set[str] = set(tokenizer.all_special_tokens)
    characters = {character: byte for byte, character in _byte_characters().items()}
    table = [b""] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        if token in special:
            continue
        if token in added:
            table[number] = token.encode()
        elif byte_level:
            table[number] = bytes(characters[c] for c in token if c in characters)
        elif sentence_piece and len(token) == 6 and token.startswith("<0x"):
            table[number] = bytes([int(token[3:5], 16)])
        elif sentence_piece:
            table[number] = token.replace("▁", " ").encode()
        else:
            table[number] = token.encode()
    return table


def _byte_characters() -> dict[int, str]:
    """GPT-2's table: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}
