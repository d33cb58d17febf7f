"""The sampler against plain definitions of its filters."""

from __future__ import annotations

import pytest
import torch

from services.core.models.spelling import Overhang, Spelling
from services.inference.engine.sampler import Sampler, distribution
from services.inference.engine.sequence import Sampling, Sequence
from services.inference.engine.text import TextStream

VOCABULARY = [b"a", b"b", b"ab", b"c", b"\n"]
LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 3.0])


def make(
    sampling: Sampling,
    prompt: list[int] | None = None,
    overhang: str = "",
    ids: tuple[int, ...] = (),
    vocabulary: list[bytes] = VOCABULARY,
) -> Sequence:
    return Sequence(
        prompt=prompt or [3],
        max_tokens=5,
        text=TextStream(vocabulary, overhang=Overhang.of(overhang, ids, vocabulary)),
        deliver=lambda _: None,
        sampling=sampling,
    )


def sample(sampler: Sampler, logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """Without guesses."""
    return [token for (token,) in sampler.sample(logits, [(sequence, ()) for sequence in sequences])]


def spread(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The probability of every token."""
    ids, probabilities = distribution(logits, sampling)
    return probabilities if ids is None else torch.zeros_like(logits).index_put((ids,), probabilities)


def kept(sampling: Sampling) -> set[int]:
    return set(spread(LOGITS, sampling).nonzero().flatten().tolist())


def test_temperature_is_a_softmax() -> None:
    expected = (LOGITS / 0.7).softmax(-1)
    assert torch.allclose(spread(LOGITS, Sampling(temperature=0.7)), expected)


@pytest.mark.parametrize("width", [0.5, 3.0])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.8, top_p=0.9),
        Sampling(temperature=1.5, top_k=300, top_p=0.7),
        Sampling(temperature=0.8, top_p=0.95, min_p=0.02),
        Sampling(temperature=1, top_k=50, min_p=0.1),
        Sampling(temperature=1, min_p=0.3),
    ],
)
def test_filters_of_many_tokens_are_those_of_their_definitions(sampling: Sampling, width: float) -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * width
    wanted = (logits / sampling.temperature).double()
    if sampling.top_k:
        wanted[wanted < wanted.sort().values[-sampling.top_k]] = -torch.inf
    ordered, order = wanted.softmax(-1).sort(descending=True)
    if sampling.top_p < 1:
        wanted[order[ordered.cumsum(-1) - ordered >= sampling.top_p]] = -torch.inf
    shares = wanted.softmax(-1)
    wanted[shares < sampling.min_p * shares.max()] = -torch.inf
    torch.testing.assert_close(spread(logits, sampling).double(), wanted.softmax(-1), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    ("sampling", "tokens"),
    [
        (Sampling(temperature=1, top_k=2), {4, 0}),
        (Sampling(temperature=1, top_k=99), {0, 1, 2, 3, 4}),
        (Sampling(temperature=1, top_p=0.01), {4}),
        (Sampling(temperature=1, top_p=0.8), {4, 0}),
        (Sampling(temperature=1, min_p=0.3), {4, 0}),
        (Sampling(temperature=1, min_p=1.0), {4}),
    ],
)
def test_filters_keep_what_they_say(sampling: Sampling, tokens: set[int]) -> None:
    assert kept(sampling) == tokens


def test_greedy_and_random_side_by_side() -> None:
    sampler = Sampler(Spelling(VOCABULARY))
    sequences = [make(Sampling()), make(Sampling(temperature=1, seed=1)), make(Sampling(temperature=1, seed=1))]
    tokens = [sample(sampler, LOGITS.expand(3, -1), sequences) for _ in range(20)]
    assert all(greedy == 4 and one == two for greedy, one, two in tokens)
    assert len({one for _, one, _ in tokens}) > 1, "each step draws anew"


def test_drawn_tokens_follow_the_distribution() -> None:
    sampler, sequence = Sampler(Spelling(VOCABULARY)), make(Sampling(temperature=1, seed=0))
    drawn = [sample(sampler, LOGITS[None], [sequence])[0] for _ in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=5) / len(drawn)
    assert torch.allclose(shares, LOGITS.softmax(-1), atol=0.03)


def test_repetition_penalty_lowers_what_was_there() -> None:
    sampler = Sampler(Spelling(VOCABULARY))
    sequence = make(Sampling(repetition_penalty=2.0), prompt=[4])
    assert sample(sampler, LOGITS[None], [sequence]) == [0]
    negative = torch.tensor([-1.0, -1.5, -9.0, -9.0, -0.9])
    assert sample(sampler, negative[None], [sequence]) == [0], "a negative logit goes down, too"


def test_the_overhang_allows_only_what_spells_it() -> None:
    sampler = Sampler(Spelling(VOCABULARY))
    assert sample(sampler, LOGITS[None], [make(Sampling(), overhang="abc")]) == [0]
    assert sample(sampler, LOGITS[None], [make(Sampling(), overhang="c")]) == [3]
    assert sample(sampler, LOGITS[None], [make(Sampling(), overhang="é")]) == [4], "what cannot be spelled binds nobody"


def test_blanks_are_spelled_as_the_tokenizer_groups_them() -> None:
    blanks = [b" ", b"  ", b"   x", b"    ", b"x"]
    sampler = Sampler(Spelling(blanks))

    def chosen(overhang: str, ids: tuple[int, ...], drafts: tuple[int, ...] = ()) -> tuple[int, ...]:
        sequence = make(Sampling(), overhang=overhang, ids=ids, vocabulary=blanks)
        return sampler.sample(torch.tensor([[9.0, 1.0, 2.0, 0.0, 3.0]]).repeat(3, 1), [(sequence, drafts)])[0]

    assert chosen("   ", ()) == (0,), "nobody said how"
    assert chosen("   ", (1, 0)) == (2,), "a token that goes on is as good"
    assert chosen("     ", (3, 0)) == (3,), "one by one is not"
    assert chosen("     ", (3, 0), (3, 0)) == (3, 0, 0), "behind it anything"
    assert chosen("x", (4,)) == chosen("x", ()) == (4,)


def test_what_pads_the_embeddings_is_never_chosen() -> None:
    sampler = Sampler(Spelling(VOCABULARY))
    padded = torch.cat([LOGITS, torch.tensor([9.0, 99.0])])[None].expand(2, -1)
    for _ in range(20):
        greedy, drawn = sample(sampler, padded, [make(Sampling()), make(Sampling(temperature=1, seed=1))])
        assert greedy == 4 and drawn < len(VOCABULARY)
