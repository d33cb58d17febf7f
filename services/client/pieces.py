"""A completion as it arrives, in one type for both of inference's streams."""

from __future__ import annotations

from dataclasses import dataclass

from codegraft.inference.v1.completion_pb2 import ChatResponse, CompleteResponse, Finished, Started


@dataclass(frozen=True, slots=True)
class Piece:
    """One message of a completion: ``started`` first, then text, ``finished`` last."""

    text: str = ""
    """New text; empty in the first and the last piece."""
    started: Started | None = None
    """In the first piece: the model and the adapter version that answers to the end."""
    finished: Finished | None = None
    """In the last piece: why it ended, tokens used, timings."""

    @classmethod
    def of(cls, message: CompleteResponse | ChatResponse) -> Piece:
        """The piece that a message carries."""
        match message.WhichOneof("part"):
            case "started":
                return cls(started=message.started)
            case "finished":
                return cls(finished=message.finished)
            case _:
                return cls(text=message.delta.text)
