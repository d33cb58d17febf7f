"""From files to rows of tokens: rendered as inference renders its prompts, packed, a pure function of (seed, step)."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from services.core.models import prompts
from services.core.models.prompts import PromptFormat, Tokenizer
from services.trainer.corpus import cuts, syntax
from services.trainer.corpus.packing import IGNORED, Row, pack, padded

__all__ = ["IGNORED", "Corpus", "Counts", "Document", "Part", "Row", "base_loss", "pack", "padded", "read_part"]

_SLACK = 4
"""Tokens that a text may gain where it is cut: both ends of a token that the cut divides are tokenized anew. The rare
piece that gains more is trained plain."""
_FULL, _GUESSES = 0.96, 3
"""A piece that fills less than this of a row is made anew, a few times at most."""
_LEAST_ROOM = 32
"""Tokens of text in a row below which nothing is cut out: a window this small, or a path this long, leaves no sense."""


@dataclass(frozen=True, slots=True)
class Document:
    """One file of a dataset."""

    path: str
    source: str
    """Resource name of its source."""
    text: str
    language: str = ""
    """Linguist's name; empty when unknown."""


@dataclass(frozen=True, slots=True)
class Part:
    """Train or test part of a dataset."""

    documents: list[Document]
    base_loss: float
    """Token-weighted mean of the files' losses under the scan's model, in nats per token; 0 when not measured."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What one pass over the files consists of. Fields are those of the proto message DataMetrics."""

    documents: int
    """Files."""
    empty_documents: int
    """Of these, without a token to predict: the only ones of which nothing is trained."""
    pieces: int
    """Parts that are drawn on their own: a long file has several, all of its text is in one of them."""
    fim_pieces: int
    """Of these, trained with a middle to fill in."""
    tokens: int
    """Tokens as rendered: text, paths and markers."""
    labels: int
    """Of these, tokens that are learned: all but the first of each piece."""
    rows: int
    padding: int
    """Positions of the rows that hold nothing."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Text that is trained as one document."""

    start: int
    end: int
    is_end: bool
    """Whether the file ends with it."""
    ids: array[int]
    """As a plain document."""


def read_part(path: Path) -> Part:
    """Reads the train or the test part: a folder of shards."""
    there = pq.ParquetDataset(path).schema.names
    wanted = [
        name for name in ("path", "source", "text", "language") if name in there
    ]  # datasets of others may lack it
    rows = pq.read_table(path, columns=wanted).to_pylist()
    documents = [Document(row["path"], row["source"], row["text"], row.get("language") or "") for row in rows]
    return Part(documents, base_loss(path))


def base_loss(path: Path) -> float:
    """Token-weighted mean of the files' losses under the scan's model, in nats per token; 0 when not measured."""
    rows = pq.read_table(path, columns=["tokens", "loss"]).to_pylist()
    measured = [(row["tokens"], row["loss"]) for row in rows if row["loss"] is not None and row["tokens"]]
    weight = sum(tokens for tokens, _ in measured)
    return sum(tokens * loss for tokens, loss in measured) / weight if weight else 0.0


class Corpus:
    """The train part as batches of rows. Each epoch has an order, and fill-in-the-middle cuts, of its own.

    Every token of every file is trained in every epoch. For fill-in-the-middle a file that does not fit a row is split
    at line ends into pieces that do, with the path before each, as a prompt from the middle of a long file is cut too;
    each piece is drawn as plain or with a middle on its own.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: Tokenizer,
        fmt: PromptFormat,
        *,
        window: int,
        fim_rate: float,
        seed: int,
    ) -> None:
        self._documents = documents
        self._tokenizer = tokenizer
        self._fmt = fmt
        self._window = window
        self._fim_rate = fim_rate if fmt.fills_in_the_middle else 0.0
        self._seed = seed
        self._pieces = [list(self._split(document)) for document in documents]
        self._epoch = -1
        self._rows: list[Row] = []
        self._first = 0
        self._counts: Counts | None = None
        self.tokens = sum(len(piece.ids) for pieces in self._pieces for piece in pieces)
        """Tokens of one pass over the files."""

    def has_rows(self) -> bool:
        """Whether there is anything to learn from: a document of one token has nothing to predict."""
        return any(len(piece.ids) > 1 for pieces in self._pieces for piece in pieces)

    def batch(self, step: int, size: int) -> list[Row]:
        """The rows of an optimizer step (from 0). The same seed, step and size give the same rows in any process."""
        return [self._row(step * size + offset) for offset in range(size)]

    def counts(self) -> Counts:
        """What the first pass over the files consists of."""
        if self._counts is None:
            self._row(0)
        assert self._counts is not None
        return self._counts

    def _row(self, index: int) -> Row:
        if index < self._first:
            self._epoch, self._rows, self._first = -1, [], 0
        while index >= self._first + len(self._rows):
            self._first += len(self._rows)
            self._epoch += 1
            whole, loose = self._draw(self._epoch)
            self._rows = pack(loose, self._window, whole=whole)
            # A run may end within its first pass: so much of it as there is comes from all files alike.
            random.Random(f"{self._seed}/{self._epoch}/rows").shuffle(self._rows)
            self._counts = self._counts or self._count(whole, loose)
        return self._rows[index - self._first]

    def _count(self, whole: list[list[int]], loose: list[array[int]]) -> Counts:
        labels = sum(len(row.ids) for row in self._rows)
        return Counts(
            documents=len(self._documents),
            empty_documents=sum(sum(len(piece.ids) for piece in pieces) < 2 for pieces in self._pieces),
            pieces=len(whole) + len(loose),
            fim_pieces=len(whole),
            tokens=sum(map(len, whole)) + sum(map(len, loose)),
            labels=labels,
            rows=len(self._rows),
            padding=len(self._rows) * self._window - labels,
        )

    def _draw(self, epoch: int) -> tuple[list[list[int]], list[array[int]]]:
        """The pieces with a middle to fill in, and the plain ones, of one epoch."""
        rng = random.Random(f"{self._seed}/{epoch}")
        order = list(range(len(self._documents)))
        rng.shuffle(order)
        whole: list[list[int]] = []
        loose: list[array[int]] = []
        for number in order:
            document, pieces = self._documents[number], self._pieces[number]
            chosen = [bool(self._fim_rate) and rng.random() < self._fim_rate for _ in pieces]
            tree = syntax.parse(document.language, document.text) if any(chosen) else None
            for piece, is_fim in zip(pieces, chosen, strict=True):
                ids = self._middle(document, piece, tree, rng) if is_fim else None
                if ids is None:
                    loose.append(piece.ids)
                else:
                    whole.append(ids)
        return whole, loose

    def _middle(
        self, document: Document, piece: _Piece, tree: syntax.SyntaxTree | None, rng: random.Random
    ) -> list[int] | None:
        """The piece with a middle moved to the end; None where the cut leaves no suffix, or it does not fit a row."""
        first, second = cuts.draw(document.text, piece.start, piece.end, tree, rng)
        if second == piece.end:
            return None
        ids = prompts.training_fim(
            self._fmt,
            self._tokenizer,
            path=document.path,
            prefix=document.text[piece.start : first],
            middle=document.text[first:second],
            suffix=document.text[second : piece.end],
        )
        return ids if len(ids) <= self._window + 1 else None

    def _split(self, document: Document) -> Iterator[_Piece]:
        """The pieces of a document: each as long as fits a row, up to a line end."""
        text, room = document.text, self._room(document.path)
        piece = self._piece(document, 0, len(text))
        if not room or len(piece.ids) <= room:
            yield piece
            return
        start, size = 0, len(text) * room / len(piece.ids)  # characters that probably fit
        while start < len(text):
            piece = self._piece(document, start, _line_end(text, start, start + round(size)))
            for _ in range(_GUESSES):
                if len(piece.ids) <= room and (piece.is_end or len(piece.ids) >= _FULL * room):
                    break
                size = (piece.end - start) * room / len(piece.ids)
                piece = self._piece(document, start, _line_end(text, start, start + round(size)))
            while len(piece.ids) > room and piece.end > start + 1:  # one long line
                piece = self._piece(document, start, start + (piece.end - start) // 2)
            yield piece
            start = piece.end

    def _room(self, path: str) -> int:
        """Tokens that a piece may have with its path; 0 means any number, for nothing can be cut out of it."""
        if not self._fim_rate:
            return 0
        frame = prompts.training_fim(self._fmt, self._tokenizer, path=path, prefix="a", middle="b", suffix="c")
        plain = prompts.training_document(self._fmt, self._tokenizer, path=path, text="abc")
        room = self._window + 1 - (len(frame) - len(plain)) - _SLACK
        return room if room >= len(plain) + _LEAST_ROOM else 0

    def _piece(self, document: Document, start: int, end: int) -> _Piece:
        is_end = end == len(document.text)
        ids = prompts.training_document(
            self._fmt, self._tokenizer, path=document.path, text=document.text[start:end], is_end=is_end
        )
        return _Piece(start, end, is_end, array("i", ids))


def _line_end(text: str, start: int, near: int) -> int:
    """The last line end up to a place; that place where there is none: a cut within a line."""
    cut = text.rfind("\n", start, near) + 1
    return cut if cut > start else min(max(near, start + 1), len(text))
