"""The proof that an adapter helps: what base and adapter do on held-out code, and how sure the difference is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from codegraft.trainer.v1.run_event_pb2 import Proof, ProofFigures
from services.core import places
from services.core.errors import JobCancelled
from services.core.models.prompts import PromptFormat, Tokenizer
from services.core.places import Place, Score
from services.trainer.corpus.data import Document
from services.trainer.model.lora import Trainee
from services.trainer.planning.plan import PROMPT_TOKENS, foreign_tokens
from services.trainer.planning.settings import Settings
from services.trainer.proving import foreign
from services.trainer.proving.evaluate import HeldOut
from services.trainer.proving.generate import LineWriter
from services.trainer.ranks import ALONE, Ranks

RESAMPLES = 10_000
_AT_ONCE = 1_000_000
"""Numbers drawn together, so that many files need no more memory than few."""
_FEWEST_PAIRS = 5
"""Of fewer pairs no test can tell: all signs alike happen by chance once in 2 ** n."""
_SURE = 0.05


@dataclass(slots=True)
class Measures:
    """What was measured of one version of the model."""

    test_loss: float
    """Nats per token."""
    by_file: list[float]
    """Nats of each test file."""
    foreign_loss: float | None = None
    """Nats per token; None when there is no foreign code."""
    next_lines: list[float] = field(default_factory=list)
    """Edit similarity of each line that was written."""
    middles: list[float] = field(default_factory=list)
    """Edit similarity of each line that was filled in."""


class Exam:
    """What is asked of base and adapter beside the test loss.

    Args:
        next_lines: places to go on at, seeing what stands above.
        middles: places to fill in, seeing what stands above and below.
        foreign: None when nothing foreign is at hand.
        apart: whether several ranks may write different lines. Not where the base is spread over them: then each pass
            of one is a pass of all.
    """

    def __init__(
        self,
        writer: LineWriter,
        next_lines: Sequence[Place],
        middles: Sequence[Place],
        foreign: HeldOut | None,
        *,
        apart: bool = True,
    ) -> None:
        self._writer = writer
        self._next_lines = next_lines
        self._middles = middles
        self._foreign = foreign
        self._apart = apart

    @classmethod
    def of(
        cls,
        train: Sequence[Document],
        test: Sequence[Document],
        tokenizer: Tokenizer,
        fmt: PromptFormat,
        settings: Settings,
        *,
        apart: bool = True,
    ) -> Exam:
        """The exam of a run: a function of its settings and files."""
        # A base that was never taught the sentinels is nothing to measure filled-in lines against.
        has_fim = fmt.fills_in_the_middle and not fmt.sentinels
        count = settings.proof_places
        chosen = places.choose(
            [(document.path, document.text) for document in test], count * (1 + has_fim), settings.seed
        )
        window = settings.context_length
        others = foreign.documents([*train, *test])
        return cls(
            LineWriter(tokenizer, fmt, budget=min(window, PROMPT_TOKENS)),
            chosen[::2] if has_fim else chosen,
            chosen[1::2] if has_fim else [],
            HeldOut(others, tokenizer, fmt, window=window, max_tokens=foreign_tokens(settings)) if others else None,
            apart=apart,
        )

    def add_foreign_loss(
        self,
        trainee: Trainee,
        measures: Measures,
        batch: int,
        is_cancelled: Callable[[], bool],
        ranks: Ranks = ALONE,
    ) -> None:
        """Measures the model as it is now on foreign code.

        Args:
            batch: rows at once.

        Raises:
            JobCancelled: it was asked for meanwhile.
        """
        if self._foreign is not None:
            measures.foreign_loss = self._foreign.evaluate(trainee, batch, is_cancelled, ranks).loss

    def add_lines(
        self, trainee: Trainee, measures: Measures, is_cancelled: Callable[[], bool], ranks: Ranks = ALONE
    ) -> None:
        """Measures how well the model as it is now writes the lines; of several ranks each writes a share of them.

        Args:
            is_cancelled: this rank's own question, for the others are at other lines; they agree at the end.

        Raises:
            JobCancelled: it was asked for meanwhile, of any rank.
        """
        for chosen, kept, use_suffix in (
            (self._next_lines, measures.next_lines, False),
            (self._middles, measures.middles, True),
        ):
            kept[:] = self._similarities(trainee, chosen, is_cancelled, ranks, use_suffix=use_suffix)

    def _similarities(
        self,
        trainee: Trainee,
        chosen: Sequence[Place],
        is_cancelled: Callable[[], bool],
        ranks: Ranks,
        *,
        use_suffix: bool,
    ) -> list[float]:
        """Of what is written at each place to what stands there."""
        if ranks.size == 1 or not self._apart:
            written = self._writer.write(trainee, chosen, ranks.agreed(is_cancelled), use_suffix=use_suffix)
            return places.similarities(written, chosen)
        share = slice(ranks.rank, None, ranks.size)
        similarities = [0.0] * len(chosen)
        cancelled: JobCancelled | None = None
        try:
            written = self._writer.write(trainee, chosen[share], is_cancelled, use_suffix=use_suffix)
            similarities[share] = places.similarities(written, chosen[share])
        except JobCancelled as error:
            cancelled = error
        # Shares are alike long, so that nobody waits here for much longer than a line takes.
        if ranks.any(cancelled is not None):
            raise cancelled or JobCancelled("cancelled while places were completed")
        return ranks.sum(similarities)


def forgets(base: Measures, adapter: Measures, most: float) -> str:
    """Why an adapter must not be published although its test loss is low; empty when it may be.

    Args:
        most: by which the foreign loss may rise, as a share of the base model's.
    """
    if base.foreign_loss is None or adapter.foreign_loss is None:
        return ""
    rise = foreign_rise(base, adapter)
    if rise <= most:
        return ""
    return (
        f"not published as best as it is: the loss on foreign code rises from {base.foreign_loss:.4f} to "
        f"{adapter.foreign_loss:.4f} ({100 * rise:+.1f} %, at most {100 * most:+.1f} % is allowed by "
        f"max_foreign_loss_increase), while the test loss is {adapter.test_loss:.4f} (base {base.test_loss:.4f})"
    )


def foreign_rise(base: Measures, adapter: Measures) -> float:
    """By what share of the base model's the loss on foreign code is higher; 0 when it was not measured."""
    if base.foreign_loss is None or adapter.foreign_loss is None:
        return 0.0
    return adapter.foreign_loss / base.foreign_loss - 1


def judge(base: Measures, adapter: Measures, *, seed: int, seconds: float) -> Proof:
    """The comparison of two versions that were measured alike, without the checkpoint's name."""
    proof = Proof(
        base=_figures(base),
        adapter=_figures(adapter),
        test_files=len(base.by_file),
        next_line_places=len(base.next_lines),
        fim_places=len(base.middles),
        test_loss_p=p_value(np.subtract(base.by_file, adapter.by_file), seed),
        next_line_p=p_value(np.subtract(adapter.next_lines, base.next_lines), seed),
        fim_p=p_value(np.subtract(adapter.middles, base.middles), seed),
        seconds=seconds,
    )
    proof.verdict = _verdict(proof)
    return proof


def p_value(gains: np.ndarray, seed: int) -> float | None:
    """One-sided paired bootstrap: how likely the mean gain is not above 0, were the pairs drawn anew.

    Args:
        gains: [pairs], positive where the adapter is better.

    Returns:
        At least 1 / (RESAMPLES + 1); None for too few pairs to tell.
    """
    pairs = len(gains)
    if pairs < _FEWEST_PAIRS:
        return None
    generator = np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // pairs)
    without_gain = 0
    for start in range(0, RESAMPLES, rows):
        drawn = generator.integers(pairs, size=(min(rows, RESAMPLES - start), pairs))
        without_gain += int((gains[drawn].sum(1) <= 0).sum())
    return (1 + without_gain) / (1 + RESAMPLES)


def _figures(measures: Measures) -> ProofFigures:
    figures = ProofFigures(test_loss=measures.test_loss, foreign_loss=measures.foreign_loss)
    if measures.next_lines:
        score = Score.of(measures.next_lines)
        figures.next_line_exact_match, figures.next_line_edit_similarity = score.exact_match, score.edit_similarity
    if measures.middles:
        score = Score.of(measures.middles)
        figures.fim_exact_match, figures.fim_edit_similarity = score.exact_match, score.edit_similarity
    return figures


def _verdict(proof: Proof) -> str:
    """In words: what is shown, and what may be chance."""
    tests = [("test loss", proof.test_files, "file", proof.test_loss_p if proof.HasField("test_loss_p") else None)]
    if proof.next_line_places:
        p = proof.next_line_p if proof.HasField("next_line_p") else None
        tests.append(("next lines", proof.next_line_places, "place", p))
    if proof.fim_places:
        p = proof.fim_p if proof.HasField("fim_p") else None
        tests.append(("filled-in lines", proof.fim_places, "place", p))
    shown = [name for name, _, _, p in tests if p is not None and p < _SURE]
    worse = [name for name, _, _, p in tests if p is not None and p > 1 - _SURE]
    open_ = [
        f"{name} ({count} {what}{'s' * (count != 1)}, " + ("too few to tell)" if p is None else f"p {p:.2f})")
        for name, count, what, p in tests
        if p is None or _SURE <= p <= 1 - _SURE
    ]
    parts = []
    if shown:
        parts.append(f"better than the base model on {' and '.join(shown)}")
    if open_:
        parts.append(f"not shown on {' and '.join(open_)}")
    if worse:
        parts.append(f"worse on {' and '.join(worse)}")
    return "; ".join(parts)
