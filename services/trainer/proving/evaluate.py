"""The test loss: token-weighted, over the same held-out tokens every time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from services.core.errors import JobCancelled
from services.core.models import prompts
from services.core.models.prompts import PromptFormat, Tokenizer
from services.trainer.corpus.data import Document, Row
from services.trainer.model.lora import Trainee
from services.trainer.ranks import ALONE, Ranks


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """What an evaluation found."""

    loss: float
    """Nats per token."""
    tokens: int
    by_source: dict[str, float]
    """Nats per token of each source's files."""
    by_file: list[float]
    """Nats of each file's evaluated tokens, in the order of the files."""


class HeldOut:
    """The held-out tokens: of every file its windows, as many as the budget allows, evenly spread over the files."""

    def __init__(
        self, documents: Sequence[Document], tokenizer: Tokenizer, fmt: PromptFormat, *, window: int, max_tokens: int
    ) -> None:
        all_ids = [_ids(fmt, tokenizer, document) for document in documents]
        share = _fair_share([len(ids) - 1 for ids in all_ids], max_tokens)
        self._sources = [document.source for document in documents]
        self._rows: list[tuple[int, Row]] = []
        for number, ids in enumerate(all_ids):
            self._rows += [(number, row) for row in _windows(ids, window, share)]
        self._rows.sort(key=lambda item: len(item[1].ids))  # rows of a batch are padded to the longest
        self.tokens = sum(len(row.ids) for _, row in self._rows)

    def evaluate(
        self, trainee: Trainee, batch: int, is_cancelled: Callable[[], bool], ranks: Ranks = ALONE
    ) -> HeldOutLoss:
        """The loss of the model as it is now; with more ranks each of them evaluates its share, and knows the whole.

        Args:
            batch: rows at once.
            is_cancelled: with more ranks a question that they agree on.

        Raises:
            JobCancelled: it was asked for meanwhile.
        """
        nats = [0.0] * len(self._sources)
        counts = [0] * len(self._sources)
        for number, row in self._rows:
            counts[number] += len(row.ids)
        share = ranks.share([row for _, row in self._rows])
        numbers = [number for number, _ in self._rows][ranks.rank :: ranks.size]
        for start in range(0, len(share), batch):
            if is_cancelled():
                raise JobCancelled("cancelled during an evaluation")
            part = slice(start, start + batch)
            # Not strict: the row that fills up a short share belongs to no file.
            for number, losses in zip(numbers[part], trainee.losses(share[part]), strict=False):
                nats[number] += float(losses.to(torch.float64).sum())
        nats = ranks.sum(nats)
        sources: dict[str, tuple[float, int]] = {}
        for source, sum_, count in zip(self._sources, nats, counts, strict=True):
            before, tokens = sources.get(source, (0.0, 0))
            sources[source] = before + sum_, tokens + count
        return HeldOutLoss(
            loss=sum(nats) / sum(counts),
            tokens=sum(counts),
            by_source={source: total / tokens for source, (total, tokens) in sorted(sources.items()) if tokens},
            by_file=nats,
        )


def _ids(fmt: PromptFormat, tokenizer: Tokenizer, document: Document) -> list[int]:
    return prompts.training_document(fmt, tokenizer, path=document.path, text=document.text)


def _fair_share(lengths: Sequence[int], budget: int) -> int:
    """The largest number of tokens per file with which all files together keep within the budget."""
    left, files = budget, len(lengths)
    for length in sorted(lengths):
        if length * files > left:
            return max(2, left // files)
        left -= length
        files -= 1
    return max([2, *lengths])


def _windows(ids: Sequence[int], window: int, most: int) -> Iterator[Row]:
    """Rows of a file, ``most`` tokens at most; of a longer file evenly spread samples: its head alone says little."""
    tokens = len(ids) - 1
    if tokens <= most:
        for start in range(0, tokens, window):
            yield _row(ids, start, min(start + window, tokens))
        return
    count = math.ceil(most / window)
    size = most // count
    for number in range(count):
        start = (tokens - size) * (number + 1) // (count + 1) if count < 2 else (tokens - size) * number // (count - 1)
        yield _row(ids, start, start + size)


def _row(ids: Sequence[int], start: int, end: int) -> Row:
    return Row(list(ids[start:end]), list(ids[start + 1 : end + 1]), list(range(end - start)))
