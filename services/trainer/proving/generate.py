"""Completes places with the model in training as inference would: same prompts, healed, greedy, to the line's end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from services.core.errors import JobCancelled
from services.core.models import prompts
from services.core.models.prompts import Prompt, PromptFormat
from services.core.models.spelling import Overhang, Spelling, token_bytes
from services.core.places import Place
from services.trainer.model.lora import Trainee

MAX_NEW_TOKENS = 32
"""Per line; places have 80 characters at most."""
_TOKENS_AT_ONCE = 3072
"""Of prompts that are read together: a cancellation waits for no more."""
_ROWS_AT_ONCE = 16


@dataclass(slots=True)
class _Line:
    """One completion on its way."""

    overhang: Overhang
    text: bytes = b""
    tokens: int = 0
    """New ones; those that only repeat do not count, as in inference."""

    def push(self, token: int, data: bytes) -> None:
        """Takes a token with its bytes."""
        self.overhang, new = self.overhang.after(token, data)
        self.text += new
        self.tokens += bool(new) or not data

    @property
    def is_complete(self) -> bool:
        """Whether a line that is not blank has ended, or is too long."""
        return self.tokens >= MAX_NEW_TOKENS or b"\n" in self.text.lstrip()


class LineWriter:
    """Writes the lines of places.

    Args:
        tokenizer: of transformers.
        budget: most tokens of a prompt.
    """

    def __init__(self, tokenizer: prompts.Tokenizer, fmt: PromptFormat, *, budget: int) -> None:
        self._tokenizer = tokenizer
        self._fmt = fmt
        self._budget = budget
        self._vocabulary = token_bytes(tokenizer)
        self._spelling = Spelling(self._vocabulary)

    def write(
        self, trainee: Trainee, places: Sequence[Place], is_cancelled: Callable[[], bool], *, use_suffix: bool
    ) -> list[str]:
        """What the model as it is now writes at each place.

        Args:
            use_suffix: whether it is shown what follows (fill in the middle).

        Raises:
            JobCancelled: it was asked for meanwhile.
        """
        rendered = [self._prompt(place, use_suffix) for place in places]
        lines = [_Line(Overhang.of(made.overhang, made.overhang_ids, self._vocabulary)) for made in rendered]
        for batch in _batches([len(prompt.ids) for prompt in rendered]):

            def choose(logits: torch.Tensor, going: Sequence[int], batch: list[int] = batch) -> list[int | None]:
                if is_cancelled():
                    raise JobCancelled("cancelled while places were completed")
                return self._choose(logits, [lines[batch[number]] for number in going])

            trainee.generate([rendered[number].ids for number in batch], choose)
        return [line.text.decode(errors="replace") for line in lines]

    def _prompt(self, place: Place, use_suffix: bool) -> Prompt:
        return prompts.completion_prompt(
            self._fmt,
            self._tokenizer,
            path=place.path,
            prefix=place.prefix,
            suffix=place.suffix if use_suffix else "",
            budget=self._budget,
        )

    def _choose(self, logits: torch.Tensor, lines: Sequence[_Line]) -> list[int | None]:
        """The likeliest token of each line, of those that spell its overhang while there is one; None where it ends."""
        logits = logits[:, : self._spelling.size]  # what pads the embeddings is no token, and has no text
        chosen: list[int | None] = list(logits.argmax(-1).tolist())
        for row, line in enumerate(lines):
            if allowed := self._spelling.beginning(line.overhang):
                kept = torch.tensor(allowed, device=logits.device)
                chosen[row] = allowed[int(logits[row, kept].argmax())]
            token = chosen[row]
            if token in self._fmt.stop_ids:
                chosen[row] = None
            elif token is not None:
                line.push(token, self._vocabulary[token])
                if line.is_complete:
                    chosen[row] = None
        return chosen


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of prompts that are read together: of like length, for the shorter ones are padded."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        if batch and (len(batch) == _ROWS_AT_ONCE or (len(batch) + 1) * lengths[number] > _TOKENS_AT_ONCE):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
