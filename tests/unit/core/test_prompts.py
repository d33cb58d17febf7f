"""The prompt formats: detection by vocabulary, budgets, and serving order equal to training order."""

from __future__ import annotations

import itertools
import operator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core import errors
from services.core.models import prompts
from services.core.models.spelling import token_bytes, within
from tests.unit.core import tokenizers
from tests.unit.core.tokenizers import SAMPLE

FAMILIES = list(tokenizers.MARKERS)
TOKENIZERS = {name: tokenizers.of(name) for name in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_detects_the_family_by_its_vocabulary(family: str) -> None:
    fmt = prompts.detect(TOKENIZERS[family])
    assert fmt.name == family
    assert fmt.style == {"plain": "plain", "codestral": "spm", "seedcoder": "spm"}.get(family, "psm")
    assert {fmt.eot_id, fmt.end_of_middle_id} <= set(fmt.stop_ids)
    vocabulary = TOKENIZERS[family].get_vocab()
    markers = {id for m, id in vocabulary.items() if "fim" in m.lower() or "SUF" in m or "PRE" in m or "file" in m}
    assert markers <= set(fmt.stop_ids), "a marker must never come out as text"


@pytest.mark.parametrize("end", ["<|im_end|>", "<end_of_turn>", "<|eot_id|>"])
def test_an_answer_ends_where_its_turn_of_the_chat_does(end: str) -> None:
    made = tokenizers.byte_level(["<eos>", end])  # as Gemma's: its end of text is another one
    assert made.eos_token == "<eos>" and made.get_vocab()[end] in prompts.detect(made).stop_ids


def test_one_missing_marker_makes_it_plain() -> None:
    made = tokenizers.byte_level(["<|endoftext|>", "<fim_prefix>", "<fim_suffix>"])
    assert prompts.detect(made).style == "plain"


code = st.text(st.sampled_from("abé☺ \n\t(_.=1'") | st.characters(codec="utf-8"), max_size=40)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "plain"] + ["sentinels"])
@settings(max_examples=40, deadline=None)
@given(prefix=code, middle=code, suffix=code, path=st.sampled_from(["", "a.py", "src/b c.go"]))
def test_serving_order_is_training_order(family: str, prefix: str, middle: str, suffix: str, path: str) -> None:
    tokenizer = TOKENIZERS[family.replace("sentinels", "plain")]
    fmt = prompts.detect(tokenizer)
    if family == "sentinels":
        fmt = prompts.with_sentinels(fmt)
    prompt = prompts.completion_prompt(fmt, tokenizer, path=path, prefix=prefix, suffix=suffix, budget=1000)
    if suffix:
        trained = prompts.training_fim(fmt, tokenizer, path=path, prefix=prefix, middle=middle, suffix=suffix)
    else:
        trained = prompts.training_document(fmt, tokenizer, path=path, text=prefix)
    if prefix or suffix or path:
        assert trained[: len(prompt.ids)] == prompt.ids
    assert trained[-1] == (fmt.end_of_middle_id if suffix else fmt.eot_id)


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, len(SAMPLE)))
def test_a_plain_prompt_is_a_token_prefix_of_its_document_wherever_it_is_cut(cut: int) -> None:
    tokenizer = TOKENIZERS["plain"]
    fmt = prompts.detect(tokenizer)
    prompt = prompts.completion_prompt(fmt, tokenizer, path="a.py", prefix=SAMPLE[:cut], suffix="x", budget=1000)
    document = prompts.training_document(fmt, tokenizer, path="a.py", text=SAMPLE)
    assert document[: len(prompt.ids)] == prompt.ids
    assert tokenizer.decode(prompt.ids).endswith(SAMPLE[:cut].removesuffix(prompt.overhang))
    assert SAMPLE[:cut].endswith(prompt.overhang) and not prompt.suffix_used
    spelled = list(within(token_bytes(tokenizer), prompt.overhang.encode(), prompt.overhang_ids))
    if prompt.overhang.isspace():
        document = prompts.training_document(fmt, tokenizer, path="a.py", text=SAMPLE[:cut] + "word")
    else:
        document = prompts.training_document(fmt, tokenizer, path="a.py", text=SAMPLE[:cut])
    assert document[: len(prompt.ids) + len(spelled)] == prompt.ids + spelled and (spelled or len(prompt.overhang) < 2)


@pytest.mark.parametrize("text", ["\n\nab", "x\n\n\n  ab", "x = 1\n \n\tab", "a\n\n12", "a\n\n\n"])
def test_blanks_before_the_last_word_are_tokenized_with_it(text: str) -> None:
    tokenizer = TOKENIZERS["plain"]
    fmt = prompts.detect(tokenizer)
    for sentinels in (False, True):
        fmt = prompts.with_sentinels(fmt) if sentinels else fmt
        prompt = prompts.completion_prompt(fmt, tokenizer, path="", prefix=text, suffix="", budget=100)
        document = prompts.training_document(fmt, tokenizer, path="", text=text + "c")
        assert document[: len(prompt.ids)] == prompt.ids and prompt.overhang


@pytest.mark.parametrize("family", FAMILIES)
def test_a_marker_in_a_file_is_only_text(family: str) -> None:
    tokenizer = TOKENIZERS[family]
    fmt = prompts.detect(tokenizer)
    for marker in tokenizers.MARKERS[family]:
        ids = prompts.encode(fmt, tokenizer, f"x = '{marker}'")
        assert tokenizer.get_vocab()[marker] not in ids
        text = f"x = '{marker}'"
        if fmt.joins_with_space:
            text = text.replace("▁", " ")  # SentencePiece knows no difference
        assert tokenizer.decode(ids).strip() == text


@pytest.mark.parametrize("family", FAMILIES)
def test_budget_keeps_what_is_next_to_the_cursor(family: str) -> None:
    tokenizer = TOKENIZERS[family]
    fmt = prompts.detect(tokenizer)
    prefix = "".join(f"first{n} = {n}\n" for n in range(400)) + "near_left ="
    suffix = "near_right\n" + "".join(f"last{n}\n" for n in range(400))
    prompt = prompts.completion_prompt(fmt, tokenizer, path="a.py", prefix=prefix, suffix=suffix, budget=300)
    text = tokenizer.decode(prompt.ids)
    assert len(prompt.ids) <= 300 and prompt.truncated
    assert "near_left" in text + prompt.overhang and "first0 " not in text and "last399" not in text
    assert ("near_right" in text) == prompt.suffix_used
    full = prompts.completion_prompt(fmt, tokenizer, path="a.py", prefix="a =", suffix="b", budget=300)
    assert not full.truncated


def test_cut_begins_at_the_same_token_while_the_prefix_grows() -> None:
    tokenizer = TOKENIZERS["qwen"]
    fmt = prompts.detect(tokenizer)
    begins = set()
    for typed in range(40):
        prefix = "q" * 1000 + "z" * typed
        ids = prompts.completion_prompt(fmt, tokenizer, path="", prefix=prefix, suffix="", budget=400).ids
        begins.add(len(prefix) - len(ids))
    assert len(begins) <= 2


@pytest.mark.parametrize("family", [*FAMILIES, "sentinels"])
def test_prompts_begin_alike_for_a_stride_of_typing(family: str) -> None:
    """With a suffix that is cut and other files, wherever the format puts them."""
    tokenizer = TOKENIZERS[family.replace("sentinels", "plain")]
    fmt = prompts.detect(tokenizer)
    if family == "sentinels":
        fmt = prompts.with_sentinels(fmt)
    context = [(f"c{n}.py", f"chunk{n} = 1\n" * n) for n in (9, 2, 5, 3)]
    suffix = "\n" + "".join(f"after{n} = {n}\n" for n in range(60))
    before, typed, changes, prefix = list[int](), 0, 0, ""
    for line in range(80):
        prefix += f"x{line} = {line * 7919}\n"
        prompt = prompts.completion_prompt(
            fmt, tokenizer, path="a.py", prefix=prefix, suffix=suffix, budget=640, context=context
        )
        # What comes before the cursor; the last word is tokenized with what follows it.
        alike = sum(itertools.takewhile(bool, map(operator.eq, prompt.ids, before))) + 24
        changes += alike < len(before[: before.index(fmt.suffix_id)] if fmt.style == "psm" and before else before)
        before, typed = prompt.ids, len(prompts.encode(fmt, tokenizer, prefix))
        assert len(prompt.ids) <= 640
    assert prompt.truncated and typed > 640
    assert 0 < changes <= typed / prompts.rendering.STRIDE + 1, f"{changes} times in {typed} tokens"


def test_context_goes_before_the_file_as_far_as_it_fits() -> None:
    tokenizer = TOKENIZERS["plain"]
    fmt = prompts.detect(tokenizer)
    context = [("best.py", "best = 1"), ("huge.py", "huge\n" * 200), ("good.py", "good = 2")]
    prompt = prompts.completion_prompt(
        fmt, tokenizer, path="a.py", prefix="x = y\n", suffix="", budget=120, context=context
    )
    text = tokenizer.decode(prompt.ids)
    assert text.index("good = 2") < text.index("best = 1") < text.index("x = y") and "huge" not in text


def test_a_budget_below_the_path_is_refused() -> None:
    tokenizer = TOKENIZERS["starcoder2"]
    fmt = prompts.detect(tokenizer)
    with pytest.raises(errors.PromptTooLong) as refused:
        prompts.completion_prompt(fmt, tokenizer, path="long/" * 50 + "a.py", prefix="x", suffix="y", budget=40)
    assert refused.value.field == "prompt.path"


def test_there_is_always_a_token_to_begin_with() -> None:
    for tokenizer in TOKENIZERS.values():
        fmt = prompts.detect(tokenizer)
        assert prompts.completion_prompt(fmt, tokenizer, path="", prefix="", suffix="x", budget=50).ids
        assert prompts.completion_prompt(fmt, tokenizer, path="", prefix="wor", suffix="", budget=50).ids
