"""Answers in the shape of /v1/chat/completions, which /v1/fim/completions has, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from codegraft.inference.v1.completion_pb2 import TokenLogprob
from services.client import Piece
from services.gateway.api.answers import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Delta,
    DeltaChoice,
    TokenInfo,
    TopToken,
    Usage,
)
from services.gateway.api.generation import Generation, Part, exact_reason, finish_reason
from services.gateway.api.text import spelled


class ChatShape:
    """One answer's shape.

    Args:
        with_logprobs: whether they were asked for.
    """

    def __init__(self, generation: Generation, model: str, created: int, *, with_logprobs: bool, count: int) -> None:
        self._generation, self._with_logprobs, self._count = generation, with_logprobs, count
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{generation.started.completion_id}",
            "created": created,
            "model": model,
            "system_fingerprint": generation.fingerprint,
        }

    def whole(self, parts: Sequence[Part]) -> ChatCompletion:
        """The answer of one piece."""
        choices = [
            ChatChoice(
                part.index,
                ChatMessage("assistant", part.text),
                self._logprobs(part.logprobs),
                finish_reason(part.finished),
                exact_reason(part.finished),
            )
            for part in parts
        ]
        usage = Usage.of(self._generation.started, parts)
        return ChatCompletion(object="chat.completion", **self._head, choices=choices, usage=usage)

    def opening(self) -> Iterator[ChatChunk]:
        """Chunks before the first text: each answer says who speaks."""
        for index in range(self._count):
            yield self._chunk([DeltaChoice(index, Delta("assistant", ""), None, None, None)])

    def chunks(self, piece: Piece, part: Part) -> Iterator[ChatChunk]:
        """The chunks that a piece becomes.

        Args:
            part: what came of its completion so far, the piece included.
        """
        delta = Delta(None, piece.text or None)
        reason, exact = finish_reason(part.finished), exact_reason(part.finished)
        yield self._chunk([DeltaChoice(piece.index, delta, self._logprobs(piece.logprobs), reason, exact)])

    def usage(self, parts: Sequence[Part]) -> ChatChunk:
        """The chunk that tells the tokens used."""
        return self._chunk([], Usage.of(self._generation.started, parts))

    def _chunk(self, choices: list[DeltaChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(object="chat.completion.chunk", **self._head, choices=choices, usage=usage)

    def _logprobs(self, items: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        return ChatLogprobs(
            [
                TokenInfo(
                    spelled(item.text),
                    item.logprob,
                    list(item.text),
                    [TopToken(spelled(top.text), top.logprob, list(top.text)) for top in item.top],
                )
                for item in items
            ]
        )
