"""A completion as it arrives, in one type for both of inference's streams."""

from __future__ import annotations

from dataclasses import dataclass

from codegraft.inference.v1.completion_pb2 import ChatResponse, CompleteResponse, Finished, Started, TokenLogprob


@dataclass(frozen=True, slots=True)
class Piece:
    """One message of a completion: ``started`` first, then text, ``finished`` last.

    Of n completions (``sampling.n``) the texts come in any order, and each has its own ``finished``.
    """

    text: str = ""
    """New text; empty in the first and the last piece."""
    started: Started | None = None
    """In the first piece: the model and the adapter version that answers to the end."""
    finished: Finished | None = None
    """In the last piece: why it ended, tokens used, timings."""
    index: int = 0
    """Which of the n completions."""
    tokens: int = 0
    """Tokens that the text stands for."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the text's tokens, when ``sampling.logprobs`` is set."""

    @classmethod
    def of(cls, message: CompleteResponse | ChatResponse) -> Piece:
        """The piece that a message carries."""
        match message.WhichOneof("part"):
            case "started":
                return cls(started=message.started)
            case "finished":
                return cls(finished=message.finished, index=message.finished.index)
            case _:
                delta = message.delta
                return cls(delta.text, index=delta.index, tokens=delta.tokens, logprobs=tuple(delta.logprobs))
