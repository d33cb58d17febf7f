"""Stage 2 against the plain way: one file, one forward pass, transformers' own loss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from services.core.errors import JobCancelled
from services.scanner import loss
from services.scanner.loss import FileLoss, LossMeter
from services.scanner.rules import Rules
from services.scanner.verdict import Reason
from tests.unit.inference import tiny


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    torch.set_num_threads(1)
    return tiny.make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return tiny.make_model(tokenizer)


TEXTS = ["def f(x):\n    return x + 1\n", "a = 1\n", "import os\n\nprint(os.getcwd())\n" * 3, "x" * 40]


def test_losses_are_transformers_losses(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    meter = LossMeter(model, tokenizer, window_tokens=256, max_tokens=4096, batch_tokens=512)
    measured = dict(meter.measure([(str(number), text) for number, text in enumerate(TEXTS)]))
    for number, content in enumerate(TEXTS):
        ids = torch.tensor([tokenizer(content)["input_ids"]])
        with torch.inference_mode():
            expected = model(input_ids=ids, labels=ids).loss.item()
        assert measured[str(number)].loss == pytest.approx(expected, rel=1e-4)
        assert measured[str(number)].tokens == ids.shape[1] == measured[str(number)].sampled_tokens


def test_it_stops_between_two_batches(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    meter = LossMeter(model, tokenizer, window_tokens=64, max_tokens=4096, batch_tokens=64)
    batches: list[int] = []
    files = [(str(number), "value = 1\n" * 20) for number in range(20)]
    with pytest.raises(JobCancelled):
        list(meter.measure(files, stop=lambda: len(batches) >= 2, on_batch=batches.append))
    assert len(batches) == 2


@given(st.integers(2, 5000), st.integers(32, 600), st.integers(64, 8000))
def test_windows_score_every_token_once_within_the_limit(tokens: int, window: int, limit: int) -> None:
    parts = loss.windows(tokens, window=window, limit=limit)
    scored = [position for part in parts for position in range(part.scored, part.end)]
    assert len(scored) == len(set(scored))
    assert all(0 <= part.start < part.end <= tokens and part.start < part.scored for part in parts)
    if tokens <= limit:
        assert scored == list(range(1, tokens))
    else:
        assert sum(part.end - part.start for part in parts) <= limit


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        (FileLoss(1.0, 100, 100), None),
        (FileLoss(3.0, 100, 100), None),
        (FileLoss(3.01, 100, 100), Reason.HIGH_LOSS),
        (FileLoss(1.0, 31, 31), Reason.FILTER_EMPTY),
        (FileLoss(math.nan, 100, 100), Reason.FILTER_EMPTY),
        (FileLoss(math.inf, 100, 100), Reason.FILTER_EMPTY),
    ],
)
def test_verdict_of_a_loss(measured: FileLoss, reason: Reason | None) -> None:
    finding = loss.judge(measured, Rules(), 3.0, forced=False)
    assert (finding.reason if finding else None) is reason


def test_a_threshold_is_the_same_for_all_or_follows_what_is_usual_for_a_language() -> None:
    usual = [("Python", FileLoss(1.0 + number / 100, 100, 100)) for number in range(21)]
    measured = [*usual, ("Python", FileLoss(9.0, 5, 5)), ("Python", FileLoss(math.nan, 100, 100))]
    measured += [("SQL", FileLoss(4.0, 100, 100)), ("Go", FileLoss(math.nan, 0, 0))]
    same = loss.thresholds(measured, Rules())
    assert {language: found.value for language, found in same.items()} == {"Python": 3.0, "SQL": 3.0, "Go": 3.0}
    assert (same["Python"].files, same["Python"].median, same["Python"].mad) == (21, 1.1, pytest.approx(0.05))
    own = loss.thresholds(measured, Rules(loss_mad=4))
    assert own["Python"].value == pytest.approx(1.3), "short files and those without a loss say nothing"
    assert own["SQL"].value == own["Go"].value == 3.0, "too few files to say what is usual"


def test_bits_per_byte_do_not_depend_on_the_tokenizer() -> None:
    coarse, fine = FileLoss(2.0, 100, 100), FileLoss(1.0, 200, 50)
    assert coarse.bits_per_byte(400) == fine.bits_per_byte(400) == pytest.approx(200 / math.log(2) / 400)
    assert FileLoss(1.0, 1, 1).bits_per_byte(0) == 0


def test_a_forced_file_may_have_a_high_loss() -> None:
    assert loss.judge(FileLoss(9.0, 100, 100), Rules(), 3.0, forced=True) is None
