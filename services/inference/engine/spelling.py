"""Which tokens can spell a given text: what constrains generation to begin with the overhang. Imports no torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Spelling:
    """Token ids by their bytes.

    Args:
        vocabulary: bytes of every token id; tokens without text spell nothing.
    """

    def __init__(self, vocabulary: Sequence[bytes]) -> None:
        self._ids: dict[bytes, list[int]] = {}
        for number, data in enumerate(vocabulary):
            if data:
                self._ids.setdefault(data, []).append(number)
        self._sorted = sorted(self._ids)

    def beginning(self, text: bytes) -> list[int]:
        """Ids of the tokens that begin the text or that the text begins; empty when none does."""
        found = [number for size in range(1, len(text)) for number in self._ids.get(text[:size], ())]
        at = bisect_left(self._sorted, text)
        while at < len(self._sorted) and self._sorted[at].startswith(text):
            found += self._ids[self._sorted[at]]
            at += 1
        return found
