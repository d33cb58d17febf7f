"""Answers in the shape of /v1/completions."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from codegraft.inference.v1.completion_pb2 import TokenLogprob
from services.client import Piece
from services.gateway.api.answers import TextChoice, TextCompletion, TextLogprobs, Usage
from services.gateway.api.generation import Generation, Part, exact_reason, finish_reason


class TextShape:
    """One answer's shape.

    Args:
        with_logprobs: whether they were asked for.
    """

    def __init__(self, generation: Generation, model: str, created: int, *, with_logprobs: bool) -> None:
        self._generation, self._with_logprobs = generation, with_logprobs
        self._head: dict[str, Any] = {
            "id": f"cmpl-{generation.started.completion_id}",
            "object": "text_completion",
            "created": created,
            "model": model,
            "system_fingerprint": generation.fingerprint,
        }

    def whole(self, parts: Sequence[Part]) -> TextCompletion:
        """The answer of one piece."""
        choices = [self._choice(part.text, part.index, part.logprobs, 0, part) for part in parts]
        return TextCompletion(**self._head, choices=choices, usage=Usage.of(self._generation.started, parts))

    def opening(self) -> Iterator[TextCompletion]:
        """Chunks before the first text: none."""
        return iter(())

    def chunks(self, piece: Piece, part: Part) -> Iterator[TextCompletion]:
        """The chunks that a piece becomes.

        Args:
            part: what came of its completion so far, the piece included.
        """
        offset = len(part.text) - len(piece.text)
        choice = self._choice(piece.text, piece.index, piece.logprobs, offset, part)
        yield TextCompletion(**self._head, choices=[choice], usage=None)

    def usage(self, parts: Sequence[Part]) -> TextCompletion:
        """The chunk that tells the tokens used."""
        return TextCompletion(**self._head, choices=[], usage=Usage.of(self._generation.started, parts))

    def _choice(self, text: str, index: int, logprobs: Sequence[TokenLogprob], offset: int, part: Part) -> TextChoice:
        known = _logprobs(logprobs, text, offset) if self._with_logprobs else None
        reason = finish_reason(part.finished)
        return TextChoice(text, index, known, reason, exact_reason(part.finished))


def spelled(text: bytes) -> str:
    """A token's text; part of a character as OpenAI writes it: ``bytes:\\xe2\\x96``."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def _logprobs(items: Sequence[TokenLogprob], text: str, offset: int) -> TextLogprobs:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be of several tokens
    read = [decoder.decode(item.text) for item in items]
    # The first token may begin with blanks that the prompt ends with: they are no part of the text.
    before = max(0, "".join(read).find(text))
    starts = accumulate(map(len, read), initial=0)
    return TextLogprobs(
        [spelled(item.text) for item in items],
        [item.logprob for item in items],
        [{spelled(top.text): top.logprob for top in item.top} for item in items],
        [offset + max(0, start - before) for start, _ in zip(starts, items, strict=False)],
    )
