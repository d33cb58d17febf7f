"""Golden prompts: what the models' own publications show, as the ids that training and serving give them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from services.core.models import prompts
from tests.unit.core import tokenizers

PREFIX, MIDDLE, SUFFIX = 'def print_hello_world():\n    """', 'Greets."""', '\n    print("Hello world!")'


@dataclass(frozen=True)
class Golden:
    """One family's prompt, spelled out."""

    tokenizer: str
    name: str
    bare: str
    """Without a path."""
    with_path: str
    end: str
    """After the middle."""
    document: str
    """A whole file."""


GOLDEN = [
    # Qwen/Qwen2.5-Coder README: "File-Level Code Completion" and "Repository-Level Code Completion".
    Golden(
        "real qwen",
        "qwen",
        f"<|fim_prefix|>{PREFIX}<|fim_suffix|>{SUFFIX}<|fim_middle|>",
        f"<|file_sep|>a.py\n<|fim_prefix|>{PREFIX}<|fim_suffix|>{SUFFIX}<|fim_middle|>",
        "<|endoftext|>",
        "<|file_sep|>a.py\nx = 1\n<|endoftext|>",
    ),
    # Qwen/CodeQwen1.5 README.
    Golden(
        "codeqwen",
        "codeqwen",
        f"<fim_prefix>{PREFIX}<fim_suffix>{SUFFIX}<fim_middle>",
        f"<file_sep>a.py\n<fim_prefix>{PREFIX}<fim_suffix>{SUFFIX}<fim_middle>",
        "<|endoftext|>",
        "<file_sep>a.py\nx = 1\n<|endoftext|>",
    ),
    # arXiv:2402.19173, 5.3: <file_sep><fim_prefix>filepath1\ncode1_pre<fim_suffix>code1_suf<fim_middle>code1_mid
    Golden(
        "starcoder2",
        "starcoder2",
        f"<fim_prefix>{PREFIX}<fim_suffix>{SUFFIX}<fim_middle>",
        f"<file_sep><fim_prefix>a.py\n{PREFIX}<fim_suffix>{SUFFIX}<fim_middle>",
        "<|endoftext|>",
        "<file_sep>a.py\nx = 1\n<|endoftext|>",
    ),
    # Cards of bigcode/starcoder, ibm-granite/granite-8b-code-base, smallcloudai/Refact-1_6B-fim and
    # stabilityai/stable-code-3b: the bare prompt. Metadata as in arXiv:2305.06161, 5.1: the document that is cut begins
    # with it, so it stands behind <fim_prefix>.
    Golden(
        "starcoder",
        "starcoder",
        f"<fim_prefix>{PREFIX}<fim_suffix>{SUFFIX}<fim_middle>",
        f"<fim_prefix><filename>a.py\n{PREFIX}<fim_suffix>{SUFFIX}<fim_middle>",
        "<|endoftext|>",
        "<filename>a.py\nx = 1\n<|endoftext|>",
    ),
    # deepseek-ai/DeepSeek-Coder README: "Code Insertion", and "#path" before each file of "Repository Level Code
    # Completion".
    Golden(
        "real deepseek",
        "deepseek",
        f"<｜fim▁begin｜>{PREFIX}<｜fim▁hole｜>{SUFFIX}<｜fim▁end｜>",  # noqa: RUF001
        f"#a.py\n<｜fim▁begin｜>{PREFIX}<｜fim▁hole｜>{SUFFIX}<｜fim▁end｜>",  # noqa: RUF001
        "<｜end▁of▁sentence｜>",  # noqa: RUF001
        "#a.py\nx = 1\n<｜end▁of▁sentence｜>",  # noqa: RUF001
    ),
    # google/codegemma-2b card.
    Golden(
        "codegemma",
        "codegemma",
        f"<bos><|fim_prefix|>▁{PREFIX}<|fim_suffix|>{SUFFIX}<|fim_middle|>",
        f"<bos>▁# a.py\n<|fim_prefix|>▁{PREFIX}<|fim_suffix|>{SUFFIX}<|fim_middle|>",
        "<|file_separator|>",
        "<bos>▁# a.py\nx = 1\n<eos>",
    ),
    # facebookresearch/codellama, infilling_prompt_tokens:
    # [BOS, PRE, *encode(prefix), SUF, *encode_infilling(suffix), MID]
    Golden(
        "codellama",
        "codellama",
        f"<s>▁<PRE>▁{PREFIX}▁<SUF>{SUFFIX}▁<MID>",
        f"<s>▁# a.py\n▁<PRE>▁{PREFIX}▁<SUF>{SUFFIX}▁<MID>",
        "▁<EOT>",
        "<s>▁# a.py\nx = 1\n</s>",
    ),
    # mistralai/mistral-common, encode_fim: [BOS, SUFFIX, *encode_infilling(suffix), PREFIX, *encode(prefix)]
    Golden(
        "codestral",
        "codestral",
        f"<s>[SUFFIX]{SUFFIX}[PREFIX]▁{PREFIX}",
        f"<s>▁# a.py\n[SUFFIX]{SUFFIX}[PREFIX]▁{PREFIX}",
        "</s>",
        "<s>▁# a.py\nx = 1\n</s>",
    ),
    # ByteDance-Seed/Seed-Coder README: '<[fim-suffix]>' + suffix + '<[fim-prefix]>' + prefix + '<[fim-middle]>'
    Golden(
        "seedcoder",
        "seedcoder",
        f"<[fim-suffix]>{SUFFIX}<[fim-prefix]>{PREFIX}<[fim-middle]>",
        f"# a.py\n<[fim-suffix]>{SUFFIX}<[fim-prefix]>{PREFIX}<[fim-middle]>",
        "<[end▁of▁sentence]>",
        "# a.py\nx = 1\n<[end▁of▁sentence]>",
    ),
]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)
def test_golden(golden: Golden) -> None:
    tokenizer = tokenizers.of(golden.tokenizer)
    fmt = prompts.detect(tokenizer)
    assert fmt.name == golden.name
    for path, expected in (("", golden.bare), ("a.py", golden.with_path)):
        served = prompts.completion_prompt(fmt, tokenizer, path=path, prefix=PREFIX, suffix=SUFFIX, budget=200)
        trained = prompts.training_fim(fmt, tokenizer, path=path, prefix=PREFIX, middle=MIDDLE, suffix=SUFFIX)
        if fmt.joins_with_space:  # spaces are ▁ there
            expected = expected.replace(" ", "▁")
        assert tokenizers.spelled(tokenizer, served.ids) == expected
        assert tokenizers.spelled(tokenizer, trained) == expected + MIDDLE + golden.end
        assert trained[: len(served.ids)] == served.ids and served.suffix_used and not served.overhang
        assert trained[-1] in fmt.stop_ids
    document = prompts.training_document(fmt, tokenizer, path="a.py", text="x = 1\n")
    spelled = golden.document.replace(" ", "▁") if fmt.joins_with_space else golden.document
    assert tokenizers.spelled(tokenizer, document) == spelled


def test_qwens_ids_are_the_published_ones() -> None:
    fmt = prompts.detect(tokenizers.of("real qwen"))
    assert (fmt.prefix_id, fmt.middle_id, fmt.suffix_id) == (151659, 151660, 151661)
    assert {151643, 151662, 151663, 151664} <= set(fmt.stop_ids) and fmt.eot_id == 151643
    ids = tokenizers.of("real qwen").encode("def f(x):\n    return x")
    assert ids == [750, 282, 2075, 982, 262, 470, 856]  # as Qwen2.5's own tokenizer gives them


def test_deepseeks_ids_are_the_published_ones() -> None:
    fmt = prompts.detect(tokenizers.of("real deepseek"))
    assert (fmt.prefix_id, fmt.suffix_id, fmt.middle_id, fmt.eot_id) == (128801, 128800, 128802, 1)  # DeepSeek-V3


# --- models without markers of their own ---


def test_smollm2_is_plain_and_its_unused_tokens_are_spare() -> None:
    fmt = prompts.detect(tokenizers.of("plain"))
    assert (fmt.name, fmt.style, fmt.fills_in_the_middle) == ("plain", "plain", False)
    spare = [name for name, _ in fmt.spare]
    assert spare[:2] == ["<gh_stars>", "<issue_start>"] and spare[-2:] == ["<jupyter_script>", "<empty_output>"]
    assert not {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>", "<filename>", "<repo_name>"} & set(spare)


def test_sentinels_put_the_suffix_before_a_plain_document() -> None:
    tokenizer = tokenizers.of("plain")
    fmt = prompts.with_sentinels(prompts.detect(tokenizer))
    assert (fmt.name, fmt.sentinels) == ("sentinels", ("<jupyter_script>", "<empty_output>"))
    served = prompts.completion_prompt(fmt, tokenizer, path="a.py", prefix=PREFIX, suffix=SUFFIX, budget=200)
    trained = prompts.training_fim(fmt, tokenizer, path="a.py", prefix=PREFIX, middle=MIDDLE, suffix=SUFFIX)
    head = f"<empty_output>{SUFFIX}<jupyter_script><file_sep>a.py\n"
    assert tokenizers.spelled(tokenizer, served.ids) == head + PREFIX.removesuffix(served.overhang)
    assert tokenizers.spelled(tokenizer, trained) == head + PREFIX + MIDDLE + "<|endoftext|>"
    assert trained[: len(served.ids)] == served.ids and served.suffix_used
    plain = prompts.training_document(fmt, tokenizer, path="a.py", text=PREFIX + MIDDLE)
    assert trained[-len(plain) :] == plain, "to the base the text is a document as it knows them"


def test_sentinels_have_to_be_spare_tokens_of_the_vocabulary() -> None:
    plain = prompts.detect(tokenizers.of("plain"))
    assert prompts.with_sentinels(plain, ["<gh_stars>", "<issue_start>"]).sentinels == ("<gh_stars>", "<issue_start>")
    for strange in (["<gh_stars>"], ["<gh_stars>"] * 2, ["<gh_stars>", "<file_sep>"], ["<gh_stars>", "x"], ["a"] * 3):
        with pytest.raises(ValueError, match="spare"):
            prompts.with_sentinels(plain, strange)
    with pytest.raises(ValueError, match="of its own"):
        prompts.with_sentinels(prompts.detect(tokenizers.of("qwen")))
    with pytest.raises(ValueError, match="spare"):
        prompts.with_sentinels(prompts.detect(tokenizers.byte_level(["<|endoftext|>", "<file_sep>"])))


def test_a_marker_of_the_chat_template_is_not_spare() -> None:
    tokenizer = tokenizers.byte_level(["<|endoftext|>", "<turn>", "<one>", "<two>"])
    tokenizer.chat_template = "<turn>{{ messages[0].content }}"
    assert [name for name, _ in prompts.detect(tokenizer).spare] == ["<one>", "<two>"]
