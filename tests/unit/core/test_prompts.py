"""The prompt formats: detection by vocabulary, golden renderings, and serving order equal to training order."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from services.core import errors
from services.core.models import prompts

SAMPLE = """def add(left, right):
    \"\"\"Adds two numbers.\"\"\"
    return left + right


class Client:
    def __init__(self, url: str = "http://localhost:9000") -> None:
        self._url = url
"""
FAMILIES = {
    "qwen": ["<|endoftext|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|file_sep|>"],
    "starcoder2": ["<|endoftext|>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim_pad>", "<file_sep>"],
    "deepseek": ["<｜end▁of▁sentence｜>", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "<|EOT|>"],  # noqa: RUF001
    "codellama": ["</s>", "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"],
    "codestral": ["</s>", "[PREFIX]", "[SUFFIX]", "[MIDDLE]"],
    "plain": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>", "<filename>"],
}


def byte_level(markers: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([SAMPLE] * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    bpe.add_special_tokens([AddedToken(marker, special=True) for marker in markers])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=markers[0])


def sentence_piece(markers: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe.train_from_iterator([SAMPLE] * 3, trainers.BpeTrainer(vocab_size=600, special_tokens=special))
    bpe.add_special_tokens([AddedToken(marker, special=True, normalized=False) for marker in markers])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=markers[0], unk_token="<unk>")


TOKENIZERS = {
    name: (sentence_piece if name in ("codellama", "codestral") else byte_level)(markers)
    for name, markers in FAMILIES.items()
}


def names(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """The tokens side by side, bytes as their characters."""
    text = "".join(tokenizer.convert_ids_to_tokens(ids)).replace("Ċ", "\n")
    return re.sub(r"<0x(..)>", lambda byte: chr(int(byte[1], 16)), text)


@pytest.mark.parametrize("family", FAMILIES)
def test_detects_the_family_by_its_vocabulary(family: str) -> None:
    fmt = prompts.detect(TOKENIZERS[family])
    assert fmt.name == family
    assert fmt.style == {"plain": "plain", "codestral": "spm"}.get(family, "psm")
    assert fmt.eot_id in fmt.stop_ids
    vocabulary = TOKENIZERS[family].get_vocab()
    markers = {vocabulary[m] for m in FAMILIES[family] if m != "<|EOT|>"}
    assert markers <= set(fmt.stop_ids), "a marker must never come out as text"


def test_one_missing_marker_makes_it_plain() -> None:
    assert prompts.detect(byte_level(["<|endoftext|>", "<fim_prefix>", "<fim_suffix>"])).style == "plain"


GOLDEN = [
    ("qwen", "<|file_sep|>a.py\n<|fim_prefix|>Pq<|fim_suffix|>Sq<|fim_middle|>", "Mq<|endoftext|>"),
    ("starcoder2", "<file_sep><fim_prefix>a.py\nPq<fim_suffix>Sq<fim_middle>", "Mq<|endoftext|>"),
    ("deepseek", "#a.py\n<｜fim▁begin｜>Pq<｜fim▁hole｜>Sq<｜fim▁end｜>", "Mq<｜end▁of▁sentence｜>"),  # noqa: RUF001
    ("codellama", "▁#▁a.py\n▁<PRE>▁Pq▁<SUF>Sq▁<MID>", "Mq▁<EOT>"),
    ("codestral", "▁#▁a.py\n[SUFFIX]Sq[PREFIX]▁Pq", "Mq</s>"),
    ("plain", "<file_sep>a.py\n", "PqMq<|endoftext|>"),
]


@pytest.mark.parametrize(("family", "served", "rest"), GOLDEN)
def test_golden(family: str, served: str, rest: str) -> None:
    tokenizer = TOKENIZERS[family]
    fmt = prompts.detect(tokenizer)
    prompt = prompts.completion_prompt(fmt, tokenizer, path="a.py", prefix="Pq", suffix="Sq", budget=100)
    trained = prompts.training_fim(fmt, tokenizer, path="a.py", prefix="Pq", middle="Mq", suffix="Sq")
    assert names(tokenizer, prompt.ids) == served
    assert names(tokenizer, trained) == served + rest
    assert prompt.suffix_used == (family != "plain")
    assert prompt.overhang == ("Pq" if family == "plain" else "")


code = st.text(st.sampled_from("abé☺ \n\t(_.=1'") | st.characters(codec="utf-8"), max_size=40)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "plain"])
@settings(max_examples=40, deadline=None)
@given(prefix=code, middle=code, suffix=code, path=st.sampled_from(["", "a.py", "src/b c.go"]))
def test_serving_order_is_training_order(family: str, prefix: str, middle: str, suffix: str, path: str) -> None:
    tokenizer = TOKENIZERS[family]
    fmt = prompts.detect(tokenizer)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_marker_in_a_file_is_only_text(family: str) -> None:
    tokenizer = TOKENIZERS[family]
    fmt = prompts.detect(tokenizer)
    for marker in FAMILIES[family]:
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
