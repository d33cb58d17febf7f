"""From files to rows of tokens: rendered as inference renders its prompts, packed, a pure function of (seed, step).

Documents that share a row do not see each other: positions start at 0 for each, and transformers builds the
block-diagonal mask from that as long as it gets no attention mask and no cache.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from services.core.models import prompts
from services.core.models.prompts import PromptFormat, Tokenizer

IGNORED = -100
"""Label of a position without a loss, as in services/trainer/loss (which needs torch)."""


@dataclass(frozen=True, slots=True)
class Document:
    """One file of a dataset."""

    path: str
    source: str
    """Resource name of its source."""
    text: str


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a batch; the three lists are equally long."""

    ids: list[int]
    labels: list[int]
    """The next token of each position, or IGNORED where there is none."""
    positions: list[int]
    """Position within the document, from 0."""


@dataclass(frozen=True, slots=True)
class Part:
    """Train or test part of a dataset."""

    documents: list[Document]
    base_loss: float
    """Token-weighted mean of the files' losses under the scan's model, in nats per token; 0 when not measured."""


def read_part(path: Path) -> Part:
    """Reads the train or the test part: a folder of shards."""
    rows = pq.read_table(path, columns=["path", "source", "text"]).to_pylist()
    return Part([Document(row["path"], row["source"], row["text"]) for row in rows], base_loss(path))


def base_loss(path: Path) -> float:
    """Token-weighted mean of the files' losses under the scan's model, in nats per token; 0 when not measured."""
    rows = pq.read_table(path, columns=["tokens", "loss"]).to_pylist()
    measured = [(row["tokens"], row["loss"]) for row in rows if row["loss"] is not None and row["tokens"]]
    weight = sum(tokens for tokens, _ in measured)
    return sum(tokens * loss for tokens, loss in measured) / weight if weight else 0.0


class Corpus:
    """The train part as batches of rows. Each epoch has an order, and fill-in-the-middle cuts, of its own."""

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
        self._fim_rate = fim_rate
        self._seed = seed
        self._plain = [
            prompts.training_document(fmt, tokenizer, path=document.path, text=document.text) for document in documents
        ]
        self._epoch = -1
        self._rows: list[Row] = []
        self._first = 0
        self.tokens = sum(len(ids) for ids in self._plain)
        """Tokens of one pass over the files."""

    def has_rows(self) -> bool:
        """Whether there is anything to learn from: a document of one token has nothing to predict."""
        return any(len(ids) > 1 for ids in self._plain)

    def batch(self, step: int, size: int) -> list[Row]:
        """The rows of an optimizer step (from 0). The same seed, step and size give the same rows in any process."""
        return [self._row(step * size + offset) for offset in range(size)]

    def _row(self, index: int) -> Row:
        if index < self._first:
            self._epoch, self._rows, self._first = -1, [], 0
        while index >= self._first + len(self._rows):
            self._first += len(self._rows)
            self._epoch += 1
            self._rows = list(pack(self._draw(self._epoch), self._window))
            # A run may end within its first pass: so much of it as there is comes from all files alike.
            random.Random(f"{self._seed}/{self._epoch}/rows").shuffle(self._rows)
        return self._rows[index - self._first]

    def _draw(self, epoch: int) -> Iterator[list[int]]:
        rng = random.Random(f"{self._seed}/{epoch}")
        order = list(range(len(self._documents)))
        rng.shuffle(order)
        for number in order:
            if self._fim_rate and rng.random() < self._fim_rate:
                yield self._middle(self._documents[number], rng)
            else:
                yield self._plain[number]

    def _middle(self, document: Document, rng: random.Random) -> list[int]:
        """The document with a middle moved to the end, cut at two random characters of a window of its text."""
        # About four characters are a token: what is cut out must fit a row with its markers.
        room = 3 * self._window
        start = rng.randrange(max(1, len(document.text) - room + 1))
        text = document.text[start : start + room]
        first, second = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        return prompts.training_fim(
            self._fmt,
            self._tokenizer,
            path=document.path,
            prefix=text[:first],
            middle=text[first:second],
            suffix=text[second:],
        )


def pack(documents: Iterator[list[int]], window: int) -> Iterator[Row]:
    """Rows of ``window`` positions, filled one document after the other; long ones go on in the next row.

    Every token but the first of a document is a label exactly once; only the last row may be shorter.
    """
    row = Row([], [], [])
    for ids in documents:
        start = 0
        while start < len(ids) - 1:
            room = window - len(row.ids)
            end = min(start + room, len(ids) - 1)
            row.ids.extend(ids[start:end])
            row.labels.extend(ids[start + 1 : end + 1])
            row.positions.extend(range(end - start))
            start = end
            if len(row.ids) == window:
                yield row
                row = Row([], [], [])
    if row.ids:
        yield row


def padded(rows: Sequence[Row], pad_id: int) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """ids, labels and positions of equal length: shorter rows end in a document of padding without a loss."""
    width = max(len(row.ids) for row in rows)
    gaps = [width - len(row.ids) for row in rows]
    return (
        [row.ids + [pad_id] * gap for row, gap in zip(rows, gaps, strict=True)],
        [row.labels + [IGNORED] * gap for row, gap in zip(rows, gaps, strict=True)],
        [row.positions + list(range(gap)) for row, gap in zip(rows, gaps, strict=True)],
    )
