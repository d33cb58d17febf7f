"""The next tokens of a sequence from its logits."""

from __future__ import annotations

import math

import torch

from services.core.models.spelling import Spelling
from services.inference.engine.sequence import Sampling, Sequence, TokenLogprob

_NUCLEUS = 1024
"""Tokens that are looked at for a nucleus before all are sorted: to find so many of SmolLM2's 49,152 takes 0.15 ms, to
sort all of them 3.7."""


class Sampler:
    """Greedy or random, per sequence; keeps one random generator for each that is random.

    Args:
        spelling: the vocabulary: what tokens there are, and which spell an overhang that is to be repeated.
    """

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling
        self._generators: dict[int, torch.Generator] = {}

    def sample(self, logits: torch.Tensor, sequences: list[tuple[Sequence, tuple[int, ...]]]) -> list[tuple[int, ...]]:
        """The next token ids of each sequence, at least one: as long as what is chosen was guessed, one more is chosen.

        Each is chosen as it would be without guesses, a random one with the next number of its request's generator, so
        that a seed gives the same text either way. Since a guess is one token and not a distribution, that is also the
        rejection scheme of speculative sampling (arXiv:2211.17192): it is right as often as the model draws it.

        Args:
            logits: ``[rows, embeddings]``, any float type: a sequence's own, then those after each of its guesses.
            sequences: each with its guesses.
        """
        logits = logits[:, : self._spelling.size]  # what pads the embeddings is no token, and has no text
        likeliest: list[int] = logits.argmax(-1).tolist()  # one call for all: most requests are greedy
        chosen, row = list[tuple[int, ...]](), 0
        for sequence, drafts in sequences:
            special, tokens, overhang = _is_special(sequence), list[int](), sequence.text.overhang
            for at in range(len(drafts) + 1):
                token = likeliest[row + at]
                if special:
                    allowed = self._spelling.beginning(overhang)
                    token = self._one(logits[row + at].float(), sequence, tokens, allowed)
                    overhang, _ = overhang.after(token, self._spelling.vocabulary[token])
                tokens.append(token)
                if at < len(drafts) and token != drafts[at]:
                    break
            chosen.append(tuple(tokens))
            row += len(drafts) + 1
        return chosen

    def logprobs(self, logits: torch.Tensor, tokens: tuple[int, ...], top: int) -> tuple[TokenLogprob, ...]:
        """What the model thinks of these tokens, before temperature, filters and penalty.

        Args:
            logits: ``[tokens, embeddings]``, any float type: each token's.
            top: how many of the likeliest ones come with each.
        """
        logprobs = logits[:, : self._spelling.size].float().log_softmax(-1)
        own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
        values, ids = (part.tolist() for part in logprobs.topk(top))
        return tuple(
            TokenLogprob(token, logprob, tuple(zip(ids[row], values[row], strict=True)))
            for row, (token, logprob) in enumerate(zip(tokens, own, strict=True))
        )

    def forget(self, sequence: Sequence) -> None:
        """Drops what is kept for a sequence that has ended."""
        self._generators.pop(sequence.number, None)

    def _one(self, logits: torch.Tensor, sequence: Sequence, chosen: list[int], allowed: list[int]) -> int:
        sampling = sequence.sampling
        if sampling.repetition_penalty != 1.0:
            logits = _penalized(logits, sequence, chosen)
        if allowed:
            kept = torch.tensor(allowed, device=logits.device)
            return allowed[self._choose(logits[kept], sequence)]
        return self._choose(logits, sequence)

    def _choose(self, logits: torch.Tensor, sequence: Sequence) -> int:
        if sequence.sampling.temperature == 0.0:
            return int(logits.argmax())
        ids, probabilities = distribution(logits, sequence.sampling)
        generator = self._generators.get(sequence.number)
        if generator is None:
            generator = self._generators[sequence.number] = torch.Generator(device=logits.device)
            if sequence.sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(sequence.sampling.seed)
        # torch.multinomial draws a number for every token, a millisecond for SmolLM2's.
        reached = probabilities.double().cumsum(-1)
        drawn = torch.rand(1, generator=generator, dtype=torch.float64, device=logits.device) * reached[-1]
        at = min(int(torch.searchsorted(reached, drawn, right=True)), len(reached) - 1)
        return at if ids is None else int(ids[at])


def distribution(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The tokens that are left after temperature, top-k, top-p and min-p, in that order, and their probabilities.

    Args:
        logits: ``[vocabulary]``, float32.
        sampling: its temperature is above 0.

    Returns:
        Their ids, None for all of them as they stand, and ``[left]`` probabilities.
    """
    ids: torch.Tensor | None = None
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.numel():
        logits, ids = logits.topk(sampling.top_k)
    if sampling.top_p < 1.0:
        logits, nucleus = _nucleus(logits, sampling.top_p)
        ids = nucleus if ids is None else ids[nucleus]
    if sampling.min_p > 0.0:
        (likely,) = (logits >= logits.max() + math.log(sampling.min_p)).nonzero(as_tuple=True)
        logits, ids = logits[likely], likely if ids is None else ids[likely]
    return ids, logits.softmax(-1)


def _nucleus(logits: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits and indices of the fewest tokens that have that share of the probability, the likeliest first."""
    whole = logits.logsumexp(-1)
    ordered, order = logits.topk(min(_NUCLEUS, logits.numel()))
    reached = (ordered - whole).exp().cumsum(-1)
    if reached[-1] < share:
        ordered, order = logits.sort(descending=True)
        reached = (ordered - whole).exp().cumsum(-1)
    size = int((reached < share).sum()) + 1  # the token that crosses the border stays
    return ordered[:size], order[:size]


def _penalized(logits: torch.Tensor, sequence: Sequence, chosen: list[int]) -> torch.Tensor:
    seen = torch.tensor(sorted({*sequence.tokens, *chosen}), device=logits.device)
    values, penalty = logits[seen], sequence.sampling.repetition_penalty
    return logits.index_copy(-1, seen, torch.where(values > 0, values / penalty, values * penalty))


def _is_special(sequence: Sequence) -> bool:
    sampling = sequence.sampling
    return bool(sampling.temperature or sequence.text.overhang.left or sampling.repetition_penalty != 1.0)
