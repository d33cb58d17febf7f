"""One answer on its way: who answers, then its pieces."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Literal

from codegraft.inference.v1 import completion_pb2 as pb
from codegraft.inference.v1.completion_pb2 import Finished, Started, TokenLogprob
from services.client import Piece
from services.client.streams import AsyncStream
from services.core.errors import InternalError


@dataclass(slots=True)
class Part:
    """One of the completions, so far or whole."""

    index: int
    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: Finished | None = None

    def take(self, piece: Piece) -> None:
        """Adds a piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.finished = piece.finished or self.finished


class Generation:
    """A stream of inference whose first message has come. Make it with :meth:`begun`."""

    def __init__(self, stream: AsyncStream[Piece], started: Started) -> None:
        self._stream = stream
        self.started = started

    @classmethod
    async def begun(cls, stream: AsyncStream[Piece]) -> Generation:
        """Waits for the first message.

        Raises:
            CodegraftError: the request is refused; nothing was generated.
        """
        first = await anext(stream, Piece())
        if first.started is None:
            raise InternalError("the answer has no beginning")
        return cls(stream, first.started)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The pieces after the first; the call ends with the loop over them.

        Raises:
            CodegraftError: it broke on the way.
        """
        try:
            async for piece in self._stream:
                yield piece
        finally:
            self._stream.cancel()

    async def parts(self) -> list[Part]:
        """All completions, whole, by index."""
        parts: dict[int, Part] = {}
        async for piece in self.pieces():
            parts.setdefault(piece.index, Part(piece.index)).take(piece)
        return [parts[index] for index in sorted(parts)]

    @property
    def headers(self) -> dict[str, str]:
        """What the response says of who answers."""
        headers = {"x-codegraft-adapter": self.started.adapter_sha256 or "base"}
        if self.started.checkpoint:
            headers["x-codegraft-checkpoint"] = self.started.checkpoint
        return headers

    @property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint: the base model and the version on it."""
        return f"{self.started.model}+{self.started.adapter_sha256 or 'base'}"


FinishReason = Literal["stop", "length"]
_FINISH: dict[pb.FinishReason, FinishReason] = {
    pb.FINISH_REASON_END_OF_TEXT: "stop",
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    # The text is cut off: OpenAI has no other word for it.
    pb.FINISH_REASON_DEADLINE: "length",
    pb.FINISH_REASON_SUPERSEDED: "length",
}


def finish_reason(finished: Finished | None) -> FinishReason | None:
    """OpenAI's finish_reason."""
    return None if finished is None else _FINISH.get(finished.reason, "stop")


def exact_reason(finished: Finished | None) -> str | None:
    """The contract's own: it tells an answer that a newer request replaced from one that became too long."""
    return None if finished is None else pb.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_")
