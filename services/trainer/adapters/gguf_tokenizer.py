"""A tokenizer.json as the vocabulary of a GGUF file.

A runtime of GGUF does not read the rules by which text is cut before merges apply; it knows them by name. Only rules
that are recognised piece by piece get a name here: a wrong one would tokenize code unlike training, silently.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from services.core.errors import NotSupported

_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


def add(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Adds tokens, merges, special tokens and chat template.

    Args:
        folder: of the model, with its tokenizer.json.
        vocab_size: rows of the embedding, which may be more than there are tokens.

    Raises:
        NotSupported: it is not byte pair encoding, or its rules have no known name.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise _unknown("the model has no tokenizer.json")
    tokenizer: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise _unknown(f"a tokenizer of type {model.get('type')}")
    is_sentencepiece = bool(model.get("byte_fallback"))
    tokens, types = _tokens(tokenizer, vocab_size, is_sentencepiece)
    if is_sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        # Merges are ordered by score there; the ids of such a vocabulary are in the order of its merges.
        writer.add_token_scores([-float(id) for id in range(len(tokens))])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_rules(tokenizer.get("pre_tokenizer")))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=not is_sentencepiece, n_vocab=len(tokens))
    special.add_to_gguf(writer, quiet=True)


def _tokens(tokenizer: dict[str, Any], vocab_size: int, has_bytes: bool) -> tuple[list[str], list[TokenType]]:
    tokens = [f"[PAD{id}]" for id in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    unknown = tokenizer["model"].get("unk_token")
    try:
        for token, id in tokenizer["model"]["vocab"].items():
            tokens[id] = token
            types[id] = TokenType.BYTE if has_bytes and token in _BYTES else TokenType.NORMAL
            if token == unknown:
                types[id] = TokenType.UNKNOWN
        for added in tokenizer.get("added_tokens", ()):
            tokens[added["id"]] = added["content"]
            if types[added["id"]] != TokenType.UNKNOWN:
                types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    except IndexError:
        raise _unknown("a tokenizer with more tokens than the model has embeddings") from None
    return tokens, types


def _rules(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name for the rules that cut a text into words."""
    parts = list((pre_tokenizer or {}).get("pretokenizers") or filter(None, [pre_tokenizer]))
    kinds = [part["type"] for part in parts]
    patterns = [part["pattern"].get("Regex", "") for part in parts if part["type"] == "Split"]
    digits_apart = all(part.get("individual_digits") for part in parts if part["type"] == "Digits")
    cuts_words = bool(parts) and parts[-1].get("use_regex", True)
    match kinds:
        case ["ByteLevel"] if cuts_words:
            return "gpt-2"
        case ["Digits", "ByteLevel"] if digits_apart and cuts_words:
            return "starcoder"  # StarCoder2, granite-code, SmolLM2
        case ["Split", "ByteLevel"] if not cuts_words and r"|\p{N}|" in patterns[0]:
            return "qwen2"
        case ["Split", "ByteLevel"] if not cuts_words and r"|\p{N}{1,3}|" in patterns[0]:
            return "llama-bpe"
        case [*_, "Digits", "ByteLevel"] if digits_apart and patterns[:2] == ["[\r\n]", r"\s?\p{L}+"]:
            return "deepseek-coder"
        case _:
            raise _unknown(f"a tokenizer that cuts words by {', '.join(kinds) or 'no rule'}")


def _unknown(what: str) -> NotSupported:
    return NotSupported(
        f"{what} cannot be written as GGUF", field="format", hint="Download it as PEFT or MERGED, or convert that."
    )
