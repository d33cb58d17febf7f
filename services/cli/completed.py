"""Completions as they arrive: for people, and as JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import exp

from codegraft.inference.v1 import completion_pb2
from services.cli.connect import id_of
from services.cli.output import err, print_table
from services.client import Piece


def as_json(piece: Piece) -> dict[str, object]:
    """One message. A token may be part of a character, so its bytes are beside its text."""
    return {
        "text": piece.text,
        "index": piece.index,
        "logprobs": [
            {**_token(item.text, item.logprob), "top": [_token(one.text, one.logprob) for one in item.top]}
            for item in piece.logprobs
        ],
        "started": piece.started,
        "finished": piece.finished,
    }


def stream(pieces: Iterable[Piece]) -> None:
    """One completion: its text on stdout as it comes, and how it ended on stderr."""
    started = completion_pb2.Started()
    for piece in pieces:
        started = piece.started or started
        sys.stdout.write("\n" if piece.finished else piece.text)
        sys.stdout.flush()
        if piece.finished:
            err.print(_summary(started, piece.finished), style="dim")


@dataclass
class _Whole:
    text: str = ""
    logprobs: list[completion_pb2.TokenLogprob] = field(default_factory=list)


def one_by_one(pieces: Iterable[Piece], *, headed: bool) -> None:
    """Completions that come mixed, each on stdout once it is whole, with its tokens where they were asked for.

    Args:
        headed: whether each gets its number above it.
    """
    started, wholes = completion_pb2.Started(), dict[int, _Whole]()
    for piece in pieces:
        started = piece.started or started
        whole = wholes.setdefault(piece.index, _Whole())
        whole.text += piece.text
        whole.logprobs += piece.logprobs
        if not piece.finished:
            continue
        sys.stdout.write((f"--- {piece.index + 1}\n" if headed else "") + whole.text + "\n")
        sys.stdout.flush()
        if whole.logprobs:
            print_table(["token", "logprob", "share", "likeliest"], map(_row, whole.logprobs), empty="")
        err.print(_summary(started, piece.finished), style="dim")


def _row(item: completion_pb2.TokenLogprob) -> list[object]:
    top = "  ".join(f"{_shown(one.text)} {exp(one.logprob):.1%}" for one in item.top)
    return [_shown(item.text), item.logprob, f"{exp(item.logprob):.1%}", top]


def _shown(token: bytes) -> str:
    """Quoted, so that spaces and newlines are seen."""
    return repr(token.decode(errors="backslashreplace"))


def _token(text: bytes, logprob: float) -> dict[str, object]:
    return {"text": text.decode(errors="replace"), "bytes": list(text), "logprob": logprob}


def _summary(started: completion_pb2.Started, finished: completion_pb2.Finished) -> str:
    version = (
        f"{started.checkpoint.partition('/runs/')[2].replace('checkpoints/', '')}" if started.checkpoint else "base"
    )
    reason = completion_pb2.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower().replace("_", " ")
    tokens, seconds = finished.usage.completion_tokens, finished.timings.total_seconds
    return f"{id_of(started.model)}, {version}: {tokens} tokens in {seconds:.2f} s, ended by {reason}"
