"""Text of files as token ids, whatever it contains."""

from __future__ import annotations

import re
from functools import lru_cache

from services.core.models.prompts.formats import PromptFormat, Tokenizer

_GUARD = "☺"  # any character that never merges with its right neighbour: what follows it is tokenized as a continuation


def encode(fmt: PromptFormat, tokenizer: Tokenizer, text: str, *, continues: bool = True) -> list[int]:
    """Token ids of text as text: a marker in it is not read as one, and no special token is added.

    Args:
        continues: whether other text stands before it (no space is put in front then).
    """
    if not text:
        return []
    ids: list[int] = []
    for number, piece in enumerate(_without_markers(fmt, text)):
        if fmt.joins_with_space and (continues or number):
            guarded = tokenizer.encode(_GUARD + piece, add_special_tokens=False)
            ids += guarded[len(tokenizer.encode(_GUARD, add_special_tokens=False)) :]
        else:
            ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids


def _without_markers(fmt: PromptFormat, text: str) -> list[str]:
    """The text in pieces, none of which contains a marker: each one is cut behind its first character."""
    if not fmt.control:
        return [text]
    cuts = [match.start() + 1 for match in _any_of(fmt.control).finditer(text)]
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@lru_cache(maxsize=16)
def _any_of(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, markers)))
