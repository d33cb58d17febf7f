"""Stage 2: how well the base model predicts a file, in nats per token.

A file that fits the window is read whole. A longer one is read in windows that overlap, and one over the limit in
evenly spread samples. Windows of many files go through the model together, sorted by length, without an attention mask:
attention is causal and padding is on the right, so that it cannot reach what is scored.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from services.core.errors import JobCancelled
from services.core.models import prompts
from services.scanner.rules import Rules
from services.scanner.verdict import Finding, Reason

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OVERLAP = 8
"""A window repeats this part (1/8) of its length as context that is not scored again."""
MIN_SAMPLES = 3
"""A file over the limit is read at its begin, its end and between: a header alone says little of it."""
GROUP_BATCHES = 8
"""About so many batches' worth of files is sorted together; then their losses are known. More would save padding, but
a worker that is killed loses its group."""
CHARACTERS_PER_TOKEN = 3.3
"""Of code, roughly; for estimates only."""
ROBUST_FILES = 20
"""Fewer files of a language say nothing of what is usual for it."""
HEAD_COLUMNS = 1024
"""Entries of the vocabulary whose logits exist at once."""


@dataclass(frozen=True, slots=True)
class FileLoss:
    """What the model says of one file."""

    loss: float
    """Mean nats per scored token; NaN when there is none, or the model gave no number."""
    tokens: int
    """Tokens of the file."""
    sampled_tokens: int
    """Tokens that were read."""

    def bits_per_byte(self, size: int) -> float:
        """The loss in bits per byte of a text of so many bytes; as if all of a sampled file were like its samples."""
        return self.loss * self.tokens / (math.log(2) * size) if size else 0.0


@dataclass(frozen=True, slots=True)
class Threshold:
    """What is asked of the losses of one language, and how they lie. Nats per token."""

    value: float
    """Files over this are rejected."""
    files: int
    """How many have a loss."""
    median: float
    mad: float
    """Median absolute deviation from the median."""


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens ``start`` to ``end`` of a file, of which those from ``scored`` on count."""

    start: int
    end: int
    scored: int


def windows(tokens: int, *, window: int, limit: int) -> list[Window]:
    """How a file of so many tokens is read.

    Every token but the first is scored exactly once when the file is within the limit.
    """
    if tokens < 2:
        return []
    if tokens <= limit:
        found = [Window(0, min(window, tokens), 1)]
        while (end := found[-1].end) < tokens:
            start = end - window // OVERLAP
            found.append(Window(start, min(start + window, tokens), end))
        return found
    count = max(MIN_SAMPLES, limit // window)
    size = limit // count
    starts = [round(number * (tokens - size) / (count - 1)) for number in range(count)]
    return [Window(start, start + size, start + (size // OVERLAP if start else 1)) for start in starts]


def estimate(characters: int, limit: int) -> float:
    """About how many tokens of a file will be read, before it is tokenized."""
    return min(characters / CHARACTERS_PER_TOKEN, limit)


def thresholds(measured: Sequence[tuple[str, FileLoss]], rules: Rules) -> dict[str, Threshold]:
    """What is asked of each language: the same of all, or what its own losses suggest when there are enough.

    Args:
        measured: language and loss of every file.
    """
    by_language: defaultdict[str, list[float]] = defaultdict(list)
    for language, found in measured:
        losses = by_language[language]
        if math.isfinite(found.loss) and found.tokens >= rules.min_tokens:
            losses.append(found.loss)
    told = {}
    for language, losses in by_language.items():
        median = statistics.median(losses) if losses else math.nan
        mad = statistics.median(abs(loss - median) for loss in losses) if losses else math.nan
        is_robust = rules.loss_mad is not None and len(losses) >= ROBUST_FILES
        value = median + (rules.loss_mad or 0) * mad if is_robust else rules.max_loss
        told[language] = Threshold(value, len(losses), median, mad)
    return told


def judge(measured: FileLoss, rules: Rules, threshold: float, *, forced: bool) -> Finding | None:
    """What stage 2 has against a file; None when nothing."""
    if not math.isfinite(measured.loss):
        return Finding(Reason.FILTER_EMPTY, f"no loss from {measured.tokens} tokens")
    if forced:
        return None
    if measured.tokens < rules.min_tokens:
        return Finding(Reason.FILTER_EMPTY, f"{measured.tokens} tokens")
    if measured.loss > threshold:
        return Finding(Reason.HIGH_LOSS, f"{measured.loss:.3f} nats per token, over {threshold:.3f}")
    return None


class LossMeter:
    """Measures files under one model. Blocks; for a thread of its own.

    Args:
        model: a causal language model in evaluation mode, on the device to use.
        window_tokens: longest sequence given to it.
        max_tokens: longer files are sampled.
        batch_tokens: tokens, padding included, that go through the model at once; between two batches it can stop.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        window_tokens: int,
        max_tokens: int,
        batch_tokens: int,
    ) -> None:
        longest = int(getattr(model.config, "max_position_embeddings", 0) or window_tokens)
        self._model: Any = model
        self._tokenizer: Any = tokenizer
        self._format = prompts.detect(self._tokenizer)
        self._window = min(window_tokens, longest)
        self._limit = max_tokens
        self._batch_tokens = max(batch_tokens, self._window)

    def measure(
        self,
        files: Iterable[tuple[str, str]],
        *,
        stop: Callable[[], bool] = lambda: False,
        on_batch: Callable[[int], None] = lambda tokens: None,
    ) -> Iterator[tuple[str, FileLoss]]:
        """Yields the key of every file with its loss, in groups, in the order of the files.

        Args:
            files: keys and texts; read lazily.
            stop: asked before every batch.
            on_batch: told the tokens of each batch that is done.

        Raises:
            JobCancelled: ``stop`` said so.
        """
        group: list[tuple[str, str]] = []
        size = 0.0
        for key, text in files:
            group.append((key, text))
            size += estimate(len(text), self._limit)
            if size >= GROUP_BATCHES * self._batch_tokens:
                yield from self._measure_group(group, stop, on_batch)
                group, size = [], 0.0
        yield from self._measure_group(group, stop, on_batch)

    def _measure_group(
        self, files: list[tuple[str, str]], stop: Callable[[], bool], on_batch: Callable[[int], None]
    ) -> Iterator[tuple[str, FileLoss]]:
        ids: list[list[int]] = []
        parts: list[list[Window]] = []
        for _, text in files:
            if stop():
                raise JobCancelled("the scan was cancelled")
            encoded = prompts.encode(self._format, self._tokenizer, text, continues=False)
            ids.append([*self._format.bos_ids, *encoded])
            parts.append(windows(len(ids[-1]), window=self._window, limit=self._limit))
        work = [(number, part) for number, some in enumerate(parts) for part in some]
        work.sort(key=lambda item: item[1].start - item[1].end)
        sums = [0.0] * len(files)
        for batch in self._batches(work):
            if stop():
                raise JobCancelled("the scan was cancelled")
            totals = self._forward(
                [ids[number][part.start : part.end] for number, part in batch], [p for _, p in batch]
            )
            for (number, _), total in zip(batch, totals, strict=True):
                sums[number] += total
            on_batch(sum(part.end - part.start for _, part in batch))
        begin = len(self._format.bos_ids)
        for number, (key, _) in enumerate(files):
            scored = sum(part.end - part.scored for part in parts[number])
            loss = sums[number] / scored if scored else math.nan
            yield key, FileLoss(loss, len(ids[number]) - begin, max(0, _covered(parts[number]) - begin))

    def _batches(self, work: list[tuple[int, Window]]) -> Iterator[list[tuple[int, Window]]]:
        """Windows of similar length, longest first, so that padding stays small."""
        batch: list[tuple[int, Window]] = []
        for item in work:
            longest = (batch or [item])[0][1]
            if batch and (len(batch) + 1) * (longest.end - longest.start) > self._batch_tokens:
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def _forward(self, rows: list[list[int]], parts: list[Window]) -> list[float]:
        """Sum of the negative log-likelihoods of each row's scored tokens, in nats."""
        import torch

        longest = len(rows[0])
        device = self._model.device
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        scored = [(part.scored - part.start, part.end - part.start) for part in parts]
        row_index = torch.cat([torch.full((end - first,), n) for n, (first, end) in enumerate(scored)]).to(device)
        column = torch.cat([torch.arange(first, end) for first, end in scored]).to(device)
        with torch.inference_mode():
            hidden = self._model.get_decoder()(input_ids=padded, use_cache=False).last_hidden_state[
                row_index, column - 1
            ]
            losses: Any = self._cross_entropy(hidden, padded[row_index, column]).double().cpu()
        return [float(part.sum()) for part in losses.split([end - first for first, end in scored])]

    def _cross_entropy(self, hidden: Any, targets: Any) -> torch.Tensor:
        """Negative log-likelihoods [positions] in float32 of targets [positions] after hidden [positions, width].

        The vocabulary goes by in columns whose logits stay in the processor's cache; whole rows of it would be most of
        the memory that stage 2 moves.
        """
        import torch

        head = self._model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        logits = (hidden.float() * head.weight[targets].float()).sum(1)
        wanted = self._scaled(logits if bias is None else logits + bias[targets].float())
        products = hidden.new_empty(len(hidden), HEAD_COLUMNS)
        logits = products.float()
        shares = torch.empty_like(logits)
        sums = []
        for first in range(0, len(head.weight), HEAD_COLUMNS):
            columns = head.weight[first : first + HEAD_COLUMNS]
            if len(columns) < HEAD_COLUMNS:
                products, logits, shares = (
                    part.new_empty(len(hidden), len(columns)) for part in (products, logits, shares)
                )
            torch.mm(hidden, columns.t(), out=products)
            logits.copy_(products)
            if bias is not None:
                logits += bias[first : first + HEAD_COLUMNS]
            self._scaled(logits)
            torch.log_softmax(logits, 1, out=shares)
            sums.append(logits[:, 0] - shares[:, 0])
        return torch.logsumexp(torch.stack(sums), 0) - wanted

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        """What Granite, Cohere and Gemma do between head and loss; in place."""
        config: Any = self._model.config
        if divisor := getattr(config, "logits_scaling", None):
            logits /= divisor
        if factor := getattr(config, "logit_scale", None):
            logits *= factor
        if cap := getattr(config, "final_logit_softcapping", None):
            logits.div_(cap).tanh_().mul_(cap)
        return logits


def _covered(parts: list[Window]) -> int:
    """Tokens in at least one of the windows, which are in order."""
    return sum(
        part.end - max(part.start, before) for part, before in zip(parts, [0, *(p.end for p in parts)], strict=False)
    )
