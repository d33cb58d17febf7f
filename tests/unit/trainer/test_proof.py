"""The proof: lines written as inference writes them, the verdict, and the gate before a version becomes the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from codegraft.trainer.v1.run_event_pb2 import Proof
from services.core import errors
from services.core.models import prompts, weights
from services.core.places import Place, first_line
from services.inference.engine.scheduler import Limits
from services.trainer import checkpoint, judging, loop
from services.trainer.corpus.data import Document, Row
from services.trainer.model.lora import Trainee
from services.trainer.proving import foreign, proof
from services.trainer.proving.evaluate import HeldOut, HeldOutLoss
from services.trainer.proving.generate import LineWriter
from services.trainer.proving.proof import Exam, Measures
from services.trainer.state import State
from services.trainer.story import CheckpointDue, Evaluated, Proved
from tests.unit.inference.tiny import Bench
from tests.unit.trainer.conftest import documents

Make = Callable[..., Any]
PLACES = [
    Place("a.py", "def f(x):\n    return x\n\n\ndef g(y):\n    ", "\n", "return y"),
    Place("b.py", "import os\n", "\n", "import sys"),
    Place("c.py", "x", "", "yz"),
    Place("d/e.py", "value = [1, 2, 3]\nfor each in value:\n    if each > 2 and va", "", "lue:"),
]


def stir(trainee: Trainee) -> None:
    """An adapter that changes every completion."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for master in trainee.masters.values():
            master.add_(torch.randn(master.shape, generator=generator) * 0.3)
    trainee.publish()


# --- lines ---


@pytest.fixture
def writer(tokenizer: PreTrainedTokenizerFast) -> LineWriter:
    return LineWriter(tokenizer, prompts.detect(tokenizer), budget=64)


def test_lines_are_those_that_inference_writes(
    settings: Make, trainee: Make, base: Path, tokenizer: PreTrainedTokenizerFast, writer: LineWriter
) -> None:
    fmt = prompts.detect(tokenizer)
    bench = Bench(weights.load_model(base, torch.float32), tokenizer, Limits())
    bench.engine.start()
    try:
        served = []
        for place in PLACES:
            made = prompts.completion_prompt(fmt, tokenizer, path=place.path, prefix=place.prefix, suffix="", budget=64)
            stops = frozenset(fmt.stop_ids)
            fields = {"overhang": made.overhang, "overhang_ids": made.overhang_ids, "single_line": True}
            served.append(bench.submit(made.ids, 32, stop_ids=stops, **fields).wait())
        expected = [heard.text for heard in served]
    finally:
        bench.engine.stop()
    written = writer.write(trainee(settings()), PLACES, lambda: False, use_suffix=False)
    assert len(set(expected)) == len(PLACES) and all(expected)
    # What inference holds back of a character that is cut in two stands here as a replacement character.
    assert [first_line(text).rstrip("\ufffd") for text in written] == [
        first_line(text).rstrip("\ufffd") for text in expected
    ]


def test_the_cache_and_the_padding_change_nothing(settings: Make, trainee: Make) -> None:
    made = trainee(settings())
    stir(made)
    starts = [[5, 9, 11, 70, 3, 8, 21], [44, 2], list(range(30, 60))]
    batched: list[list[int]] = [[] for _ in starts]

    def choose(logits: torch.Tensor, going: Any) -> list[int | None]:
        tokens = logits.argmax(-1).tolist()
        for number, token in zip(going, tokens, strict=True):
            batched[number].append(token)
        # Each ends at a length of its own, so that rows leave the batch one by one.
        return [
            None if len(batched[number]) == 6 + 3 * number else token
            for number, token in zip(going, tokens, strict=True)
        ]

    made.generate(starts, choose)
    for number, start in enumerate(starts):
        ids = list(start)
        while len(ids) < len(start) + 6 + 3 * number:
            with torch.no_grad():
                ids.append(int(made._model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert batched[number] == ids[len(start) :]


def test_a_cancellation_does_not_wait_for_the_line(settings: Make, trainee: Make, writer: LineWriter) -> None:
    asked: list[bool] = []

    def is_cancelled() -> bool:
        asked.append(True)
        return len(asked) == 3

    with pytest.raises(errors.JobCancelled):
        writer.write(trainee(settings()), PLACES, is_cancelled, use_suffix=False)
    assert len(asked) == 3


# --- the verdict ---


def test_p_tells_gains_from_chance() -> None:
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 1, 60)
    noise -= noise.mean()
    assert proof.p_value(noise + 1.0, 0) == pytest.approx(1 / (proof.RESAMPLES + 1))
    even = proof.p_value(noise, 0)
    assert even is not None and 0.4 < even < 0.6 and even == proof.p_value(noise, 0)
    assert proof.p_value(noise - 1.0, 0) == pytest.approx(1.0)
    # As the normal approximation has it: the mean is one standard error above 0.
    one_error = proof.p_value(noise + noise.std() / np.sqrt(60), 0)
    assert one_error == pytest.approx(0.159, abs=0.02)


@pytest.mark.parametrize(("pairs", "tells"), [(0, False), (4, False), (5, True)])
def test_few_pairs_tell_nothing(pairs: int, tells: bool) -> None:
    assert (proof.p_value(np.ones(pairs), 0) is not None) == tells


def measures(loss: float, lines: list[float], middles: list[float] | None = None) -> Measures:
    return Measures(loss, [10 * loss] * 8, 2.0, lines, middles or [])


def test_a_judgement_has_the_figures_of_both_and_says_what_is_shown() -> None:
    found = proof.judge(measures(1.5, [0.5, 1.0] * 4), measures(1.2, [1.0, 0.5] * 4), seed=1, seconds=2.5)
    assert (found.base.test_loss, found.adapter.test_loss, found.adapter.foreign_loss) == (1.5, 1.2, 2.0)
    assert (found.base.next_line_exact_match, found.base.next_line_edit_similarity) == (0.5, 0.75)
    assert not found.base.HasField("fim_exact_match") and not found.HasField("fim_p")
    assert (found.test_files, found.next_line_places, found.fim_places, found.seconds) == (8, 8, 0, 2.5)
    assert found.test_loss_p < 0.001 and 0.3 < found.next_line_p < 0.9
    assert found.verdict.startswith("better than the base model on test loss; not shown on next lines (8 places, p 0.")


def test_a_judgement_says_what_got_worse_and_what_is_too_little() -> None:
    found = proof.judge(measures(1.5, [0.9] * 8, [0.1]), measures(1.2, [0.1] * 8, [0.9]), seed=1, seconds=0)
    assert found.verdict == (
        "better than the base model on test loss; not shown on filled-in lines (1 place, too few to tell); "
        "worse on next lines"
    )


def test_forgetting_is_told_with_its_figures() -> None:
    before, after = Measures(1.5, [], 2.0), Measures(1.2, [], 2.06)
    assert not proof.forgets(before, after, 0.031)
    reason = proof.forgets(before, after, 0.02)
    assert "2.0000 to 2.0600 (+3.0 %, at most +2.0 %" in reason and "1.2000 (base 1.5000)" in reason
    assert not proof.forgets(Measures(1.5, []), Measures(1.2, []), 0.0)


def test_foreign_code_is_none_of_the_datasets() -> None:
    all_ = foreign.documents([])
    assert {document.path.rsplit(".", 1)[1] for document in all_} >= {"py", "h"} and len(all_) >= 8
    assert foreign.documents([Document("mine.py", "s", all_[0].text)]) == all_[1:]


# --- in the loop ---


@pytest.fixture
def exam(tokenizer: PreTrainedTokenizerFast, writer: LineWriter) -> Callable[..., Exam]:
    """At four places, two of which are also filled in; one file of foreign code."""

    def make() -> Exam:
        files = [Document("f.txt", "f", "int main() { return 0; }\n")]
        held_out = HeldOut(files, tokenizer, prompts.detect(tokenizer), window=64, max_tokens=64)
        return Exam(writer, PLACES, PLACES[:2], held_out)

    return make


class Forgotten:
    """Foreign code whose loss is high from the third evaluation on."""

    def __init__(self, files: HeldOut) -> None:
        self._files = files
        self._times = 0

    def evaluate(self, *arguments: Any) -> HeldOutLoss:
        self._times += 1
        return replace(self._files.evaluate(*arguments), loss=2.0 if self._times < 3 else 9.0)


class Distance:
    """Foreign code whose loss rises with the square of the adapter: by 3 % at its first evaluation."""

    def __init__(self, files: HeldOut) -> None:
        self._files = files
        self._first = 0.0

    def loss_of(self, weights: Mapping[str, torch.Tensor]) -> float:
        size = sum(float(tensor.float().square().sum()) for name, tensor in weights.items() if ".lora_B." in name)
        self._first = self._first or size
        return 2.0 * (1 + 0.03 * size / self._first) if size else 2.0

    def evaluate(self, made: Trainee, *arguments: Any) -> HeldOutLoss:
        return replace(self._files.evaluate(made, *arguments), loss=self.loss_of(made.weights()))


def train(made: Trainee, state: State, optimizer: Any, *rest: Any) -> list[Any]:
    chosen, corpus, held_out, exam = rest
    return list(loop.train(made, optimizer, chosen, corpus, held_out, state, lambda: False, exam=exam))


def test_a_version_that_forgets_is_not_the_best(
    settings: Make, trainee: Make, corpus: Make, held_out: Make, exam: Make
) -> None:
    # What the untrained model would write itself: any training makes that less likely.
    own = [10]

    def likeliest(logits: torch.Tensor, going: Any) -> list[int | None]:
        own.append(int(logits[0].argmax()))
        return [own[-1] if len(own) < 60 else None]

    trainee(settings()).generate([own[:1]], likeliest)
    alien = exam()
    alien._foreign._rows = [(0, Row(own[:-1], own[1:], list(range(len(own) - 1))))]
    for limit in (0.0, 10.0):
        chosen = settings(max_foreign_loss_increase=limit)
        made, state = trainee(chosen), State()
        optimizer = loop.make_optimizer(made, chosen)
        events = train(made, state, optimizer, chosen, corpus(chosen), held_out(chosen), alien)
        evaluations = [event for event in events if isinstance(event, Evaluated)]
        assert all(event.test.loss < evaluations[0].test.loss for event in evaluations[1:])
        is_best = [event.is_best for event in events if isinstance(event, CheckpointDue)]
        refused = [event.refused for event in evaluations[1:]]
        if limit:
            assert any(is_best) and not any(refused) and isinstance(events[-1], Proved)
        else:
            assert not any(is_best) and all("the loss on foreign code rises" in reason for reason in refused)
            assert not any(isinstance(event, Proved) for event in events) and state.best_step == 0
            assert "each that is better raises the loss on foreign code" in judging.nothing_best(
                state, "the base model"
            )


def test_of_a_version_that_forgets_a_share_is_published(
    settings: Make, trainee: Make, corpus: Make, held_out: Make, exam: Make, tmp_path: Path
) -> None:
    chosen = settings(max_foreign_loss_increase=0.02)
    made, state, judge = trainee(chosen), State(), exam()
    judge._foreign = Distance(judge._foreign)
    optimizer = loop.make_optimizer(made, chosen)
    best = []
    for event in loop.train(
        made, optimizer, chosen, corpus(chosen), held_out(chosen), state, lambda: False, exam=judge
    ):
        if isinstance(event, Evaluated):
            evaluated = event
        if isinstance(event, CheckpointDue) and event.is_best:
            now = made.weights()
            _, whole = checkpoint.save_adapter(made, tmp_path, "tiny")
            _, published = checkpoint.save_adapter(made, tmp_path, "tiny", state.best_weights)
            assert (published == whole) == (state.best_strength == 1)
            assert all(torch.equal(now[name], after) for name, after in made.weights().items())
            best.append((event, evaluated, state.best_strength, dict(state.best_weights), now))
    due, evaluated, strength, weights, now = best[-1]
    assert 0.2 < strength < 1 and "that is published" in evaluated.refused
    # The smaller the share the less of the gain, but the base model is worse than any.
    assert evaluated.test.loss < due.test_loss == state.best_loss < state.base_loss
    assert judge._foreign.loss_of(weights) <= 1.02 * 2.0 < judge._foreign.loss_of(now)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, now[name] * (strength if ".lora_B." in name else 1), rtol=0.02, atol=0)


def test_the_best_is_judged_and_the_last_goes_on(
    settings: Make, trainee: Make, corpus: Make, held_out: Make, exam: Make, writer: LineWriter, tmp_path: Path
) -> None:
    """Also by another process, when the first one died before the proof: with the same figures and weights."""
    chosen = settings()
    test = held_out(chosen)
    made, state, judge = trainee(chosen), State(), exam()
    judge._foreign = Forgotten(judge._foreign)
    optimizer = loop.make_optimizer(made, chosen)
    best_lines: list[str] = []
    found: list[Proof] = []
    for event in loop.train(made, optimizer, chosen, corpus(chosen), test, state, lambda: False, exam=judge):
        if isinstance(event, CheckpointDue):
            if event.is_best:
                best_lines = writer.write(made, PLACES, lambda: False, use_suffix=False)
            checkpoint.save_state(made, optimizer, state, tmp_path)
            last = checkpoint.save_adapter(made, tmp_path / "adapter", "tiny")[1]
        if isinstance(event, Proved):
            found.append(event.proof)
    assert state.best_step == 4, "the later ones forget, so that the best is not the last"
    assert checkpoint.save_adapter(made, tmp_path / "adapter", "tiny")[1] == last, "judged, the best leaves no trace"
    (first,) = found
    assert first.adapter.test_loss == state.best_loss and first.base.test_loss == state.base_loss
    assert first.base.HasField("foreign_loss") and (first.next_line_places, first.fim_places) == (4, 2)
    expected = proof.places.Score.of(proof.places.similarities(best_lines, PLACES))
    assert first.adapter.next_line_edit_similarity == expected.edit_similarity
    assert first.adapter.next_line_edit_similarity != first.base.next_line_edit_similarity

    after = trainee(chosen)
    optimizer = loop.make_optimizer(after, chosen)
    state = checkpoint.load_state(after, optimizer, tmp_path)
    (again,) = train(after, state, optimizer, chosen, corpus(chosen), test, judge)
    assert isinstance(again, Proved)
    again.proof.seconds = first.seconds
    assert again.proof == first
    assert checkpoint.save_adapter(after, tmp_path / "adapter", "tiny")[1] == last
    assert train(after, state, optimizer, chosen, corpus(chosen), test, judge) == []


def test_an_exam_is_made_of_settings_and_files(settings: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    long = [Document(d.path, d.source, d.text * 8) for d in documents(5)]
    fmt = prompts.detect(tokenizer)
    made = [Exam.of([], long, tokenizer, fmt, settings()) for _ in range(2)]
    assert len(made[0]._next_lines) == 24 and made[0]._next_lines == made[1]._next_lines and not made[0]._middles
    assert made[0]._foreign is not None and made[0]._foreign.tokens > 2000
