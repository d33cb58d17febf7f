"""What a sequence may go on with: guesses that the model only has to check. Knows no torch.

Prompt lookup (github.com/apoorvumang/prompt-lookup-decoding; vLLM's ngram speculation, transformers'
``prompt_lookup_num_tokens``): where the last tokens stood before in the sequence, prompt included, what followed then
is guessed to follow now. Code repeats itself, and a step over a few tokens takes little longer than a step over one,
since both read all weights. Which adapter the sequence runs on makes no difference: the guess comes from its tokens
alone, and only what the model would have chosen itself is taken (:meth:`Sampler.sample`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

FREE = 8
"""Tokens whose arithmetic takes as long as the rest of a step, above all reading the weights: 6 to 8 for SmolLM2-135M
in bf16 on two cores (a step of one takes 12 ms, of eight 23). With twice as many, eight streams are a tenth slower and
one is as fast. On a GPU it is more, so that less is guessed there than could be."""
_LONG, _SHORT = 3, 2
"""Last tokens that have to have stood there before; two where three did not. One is mostly a space or a bracket."""
_MEMORY = 0.9
"""What a guess counts after the next step with guesses: the last ten or so decide."""
_RETRY = 8
"""Steps without a guess, for want of trust, after which one token is tried again: what a completion says next may be
another matter. With 24, eight streams gain a quarter less; a try of one of 16 costs a fortieth of a step."""
_LEAST, _EACH = 12, 2
"""Guesses of a step at most: so many, or so many for each of its sequences. Who comes anew waits for the step in
progress, which four sequences of seven guesses each make half as long again. Replayed (a step of 13 ms, 1 ms a sequence
and 1.1 a token) four bring a hundredth less so, eight a fiftieth more and others as much."""


class Drafter:
    """Guesses for one sequence; learns how often they are right."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, ...], int] = {}
        self._indexed = 1
        self._right, self._tried = 2.0, 4.0  # before anything is known; of all guesses in code a bit less are right
        self._passed = 0

    @property
    def trust(self) -> float:
        """How likely the next token of a guess is right when those before it were: 0 to 1."""
        return self._right / self._tried

    def draft(self, tokens: list[int], most: int, price: float) -> tuple[int, ...]:
        """What may come next.

        Args:
            tokens: of the sequence so far; each call's begin with those of the call before.
            most: tokens of the guess.
            price: how likely a token has to be right to be worth its arithmetic, see :func:`price`.
        """
        size, likely = 0, self.trust
        while size < most and likely > price:
            size, likely = size + 1, likely * self.trust
        if size == 0 and most > 0:
            self._passed += 1
            size = int(self._passed >= _RETRY)
        begin = self._find(tokens) if size else None
        if begin is None:
            return ()
        self._passed = 0
        guess = tokens[begin : begin + size]
        while len(guess) < size:  # what repeats itself up to here goes on doing so
            guess.append(guess[len(guess) - (len(tokens) - begin)])
        return tuple(guess)

    def learn(self, guessed: int, right: int) -> None:
        """Takes note of how many tokens of a guess were right; those behind a wrong one say nothing."""
        if guessed:
            self._right = self._right * _MEMORY + right
            self._tried = self._tried * _MEMORY + min(right + 1, guessed)

    def _find(self, tokens: list[int]) -> int | None:
        """Behind which of its tokens the last ones stood before, most recently; only new tokens are looked at."""
        for end in range(self._indexed, len(tokens)):
            for length in (_LONG, _SHORT):
                if end >= length:
                    self._seen[tuple(tokens[end - length : end])] = end
        self._indexed = len(tokens)
        found = self._seen.get(tuple(tokens[-_LONG:])) if len(tokens) >= _LONG else None
        return self._seen.get(tuple(tokens[-_SHORT:])) if found is None else found


def price(tokens: int) -> float:
    """How likely one more token of a step of so many has to be right, or the step would bring more without it.

    A step of ``n`` tokens takes a time like ``FREE + n`` and brings ``n``; one more, right with likelihood ``p``, makes
    that faster when ``p > n / (FREE + n)``. So of a few sequences much is guessed and of many only what is almost sure;
    prompt tokens count as those of sequences do, so that guesses do not make others wait for theirs.
    """
    return tokens / (FREE + tokens)


def share(likely: Mapping[int, float], sizes: Mapping[int, int], budget: int) -> dict[int, int]:
    """How much of each sequence's guess is made in a step: what is most likely to be right.

    Args:
        likely: how likely each next token of its guess is right, by any name of the sequence.
        sizes: of the guesses.
        budget: of all of them.
    """
    places = sorted((-(likely[name] ** place), place, name) for name in sizes for place in range(1, sizes[name] + 1))
    return Counter(name for *_, name in places[:budget])


def most_guesses(sequences: int) -> int:
    """Guesses of a step of so many sequences."""
    return max(_LEAST, _EACH * sequences)
