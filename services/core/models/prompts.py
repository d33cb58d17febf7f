"""Prompt formats: the one place that turns code into token ids, for training and for serving.

The trainer's documents and inference's prompts come from here, so that training order is serving order by construction:
a prompt's ids are a prefix of the ids that the same place would give in training.

A model's format is told by its tokenizer's vocabulary, never by its name. Models trained to fill in the middle get
prefix and suffix between their markers; other models are "plain": they continue the prefix, and the suffix only tells
where to stop. The file's path goes before the text, behind the model's own file marker when it has one. On minio-py's
source that lowers SmolLM2's loss from 1.83 to 1.74 nats per token over the first 400 tokens of a file.

Imports no torch. Ids are Python ints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from services.core.errors import PromptTooLong

Style = Literal["psm", "spm", "plain"]

STRIDE = 128
"""Tokens by which a too long prefix is cut: while an editor types, the kept part begins at the same token for a
stride, so that cached keys and values stay valid."""

OVERHANG_CHARS = 64
"""A longer run at the cursor is not held back for healing."""

_CONTEXT_CHARS_PER_TOKEN = 16
"""Upper bound used to cut huge texts before they are tokenized."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def all_special_tokens(self) -> list[str]: ...

    def get_vocab(self) -> Mapping[str, int]: ...

    def get_added_vocab(self) -> Mapping[str, int]: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def convert_ids_to_tokens(self, ids: list[int]) -> Any: ...


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How one model wants its code."""

    name: str
    """Family of the markers: recorded in an adapter's manifest, which serves only on the same format."""
    style: Style
    """psm: prefix, suffix, middle; spm: suffix, prefix; plain: no fill-in-the-middle."""
    prefix_id: int | None
    """Marker before the prefix; None when plain."""
    suffix_id: int | None
    """Marker before the suffix; None when plain."""
    middle_id: int | None
    """Marker after which the middle is generated; None when plain or when the prefix itself is continued."""
    bos_ids: tuple[int, ...]
    """What the tokenizer puts before every document."""
    eot_id: int
    """Ends a document."""
    stop_ids: tuple[int, ...]
    """Any of these ends a completion: no text of a file contains them."""
    path_id: int | None
    """Marker before the path; None when the path is a comment line."""
    path_text: str
    """The path's line, with ``{path}``."""
    path_inside: bool
    """Whether the path's line stands behind the prefix marker instead of before it."""
    control: tuple[str, ...]
    """Strings that the tokenizer would read as markers; in a file they are only text."""
    joins_with_space: bool
    """Whether the tokenizer puts a space before every text it is given (SentencePiece)."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt."""

    ids: list[int]
    """Token ids, from the document's begin to where generation starts."""
    suffix_used: bool
    """Whether the suffix is among the ids."""
    truncated: bool
    """Whether prefix or suffix was cut to fit the budget."""
    overhang: str = ""
    """End of the prefix that the ids leave out: generation must begin with it, and the caller has it already.

    A plain model has only seen text whose words were tokenized whole. Behind a cut word, or behind a newline whose
    indentation is still to come, it would be off; so the last word or blank run is generated anew, constrained to begin
    with what is there (token healing)."""


@dataclass(frozen=True, slots=True)
class _Family:
    """Fill-in-the-middle markers that go together."""

    name: str
    style: Style
    prefix: str
    suffix: str
    middle: str
    path_inside: bool = False
    path_text: str = "# {path}\n"


_FAMILIES = (
    _Family("qwen", "psm", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    _Family("starcoder", "psm", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", path_inside=True),
    _Family("deepseek", "psm", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", path_text="#{path}\n"),  # noqa: RUF001
    _Family("codellama", "psm", "▁<PRE>", "▁<SUF>", "▁<MID>"),
    _Family("codestral", "spm", "[PREFIX]", "[SUFFIX]", ""),
)
_PATH_MARKERS = ("<|file_sep|>", "<file_sep>", "<|filename|>", "<filename>")
_END_MARKERS = ("<|endoftext|>", "<|end_of_text|>", "▁<EOT>", "<｜end▁of▁sentence｜>", "</s>")  # noqa: RUF001
_STOP_MARKERS = (
    *_END_MARKERS,
    *_PATH_MARKERS,
    *("<|fim_pad|>", "<fim_pad>", "<|repo_name|>", "<repo_name>", "<|reponame|>", "<reponame>", "<|EOT|>"),
    *("<|im_start|>", "<|im_end|>", "[MIDDLE]"),
    *(marker for family in _FAMILIES for marker in (family.prefix, family.suffix, family.middle) if marker),
)
_CONTROL = re.compile(r"(▁?<.+>|\[[A-Z_]+\])")
_NONE: list[int] = []
_GUARD = "☺"  # any character that never merges with its right neighbour: what follows it is tokenized as a continuation
_LAST_WORD = re.compile(r"(\s+| ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+)\Z")  # as GPT-2's pre-tokenizer splits


def detect(tokenizer: Tokenizer) -> PromptFormat:
    """The format of the model whose tokenizer that is.

    Raises:
        ValueError: the tokenizer has no token that ends a document.
    """
    vocabulary = tokenizer.get_vocab()
    eot_id = next((vocabulary[m] for m in _END_MARKERS if m in vocabulary), tokenizer.eos_token_id)
    if eot_id is None:
        raise ValueError("the tokenizer has no end-of-text token")
    family = next(
        (f for f in _FAMILIES if all(m in vocabulary for m in (f.prefix, f.suffix, f.middle) if m)),
        None,
    )
    if family and family.name == "codellama" and "▁<EOT>" in vocabulary:
        eot_id = vocabulary["▁<EOT>"]  # ends an infilling there, </s> ends a document
    path_marker = next((m for m in _PATH_MARKERS if m in vocabulary), None)
    stops = {vocabulary[m] for m in _STOP_MARKERS if m in vocabulary} | {eot_id}
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    specials = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    plain_ids = tokenizer.encode("x", add_special_tokens=False)
    full_ids = tokenizer.encode("x", add_special_tokens=True)
    begins = next((i for i in range(len(full_ids)) if full_ids[i : i + len(plain_ids)] == plain_ids), 0)
    first = tokenizer.convert_ids_to_tokens(plain_ids[:1])
    return PromptFormat(
        name=family.name if family else "plain",
        style=family.style if family else "plain",
        prefix_id=vocabulary[family.prefix] if family else None,
        suffix_id=vocabulary[family.suffix] if family else None,
        middle_id=vocabulary[family.middle] if family and family.middle else None,
        bos_ids=tuple(full_ids[:begins]),
        eot_id=eot_id,
        stop_ids=tuple(sorted(stops)),
        path_id=vocabulary[path_marker] if path_marker else None,
        path_text="{path}\n" if path_marker else (family.path_text if family else "# {path}\n"),
        path_inside=bool(family and family.path_inside),
        control=tuple(sorted((s for s in specials if _CONTROL.fullmatch(s)), key=len, reverse=True)),
        joins_with_space=bool(first) and str(first[0]).startswith("▁"),
    )


def encode(fmt: PromptFormat, tokenizer: Tokenizer, text: str, *, continues: bool = True) -> list[int]:
    """Token ids of text as text: a marker in it is not read as one, and no special token is added.

    Args:
        continues: whether other text stands before it (no space is put in front then).
    """
    if not text:
        return []
    ids: list[int] = []
    for number, piece in enumerate(_without_markers(fmt, text)):
        if fmt.joins_with_space and (continues or number):
            guarded = tokenizer.encode(_GUARD + piece, add_special_tokens=False)
            ids += guarded[len(tokenizer.encode(_GUARD, add_special_tokens=False)) :]
        else:
            ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids


def training_document(fmt: PromptFormat, tokenizer: Tokenizer, *, path: str, text: str) -> list[int]:
    """Ids of a whole file, left to right: path, text, end of text."""
    header = _header(fmt, tokenizer, path)
    return [*fmt.bos_ids, *header, *encode(fmt, tokenizer, text, continues=bool(header)), fmt.eot_id]


def training_fim(
    fmt: PromptFormat, tokenizer: Tokenizer, *, path: str, prefix: str, middle: str, suffix: str
) -> list[int]:
    """Ids of a file with its middle to be filled in, in serving order, then the middle and the end of text.

    A plain format, or an empty suffix, gives the document up to the middle's end.
    """
    if fmt.style == "plain" or not suffix:
        return training_document(fmt, tokenizer, path=path, text=prefix + middle)
    head, prefix_ids, between, suffix_ids, tail = _fim_parts(fmt, tokenizer, path, prefix, suffix)
    return _fim(fmt, head, prefix_ids, between, suffix_ids, tail) + encode(fmt, tokenizer, middle) + [fmt.eot_id]


def completion_prompt(
    fmt: PromptFormat,
    tokenizer: Tokenizer,
    *,
    path: str,
    prefix: str,
    suffix: str,
    budget: int,
    context: Sequence[tuple[str, str]] = (),
) -> Prompt:
    """The prompt to complete between prefix and suffix.

    Args:
        budget: most ids it may have. The prefix loses its begin and the suffix its end to fit; the suffix keeps at
            least a quarter when both are long.
        context: (path, text) of other files, the most useful first; each goes before the file, if prefix and suffix
            leave it room.

    Raises:
        PromptTooLong: not even the markers and the path fit the budget.
    """
    limit = max(budget, 1) * _CONTEXT_CHARS_PER_TOKEN
    truncated = len(prefix) > limit or len(suffix) > limit
    if len(prefix) > limit:
        step = STRIDE * _CONTEXT_CHARS_PER_TOKEN
        prefix = prefix[-(-(len(prefix) - limit) // step) * step :]
    suffix = suffix[:limit]
    if fmt.style == "plain" or not suffix:
        header = _header(fmt, tokenizer, path)
        overhang = _overhang(prefix) if fmt.style == "plain" else ""
        if overhang == prefix and not header:
            overhang = ""  # something must be there to continue
        head, between, tail, suffix_ids = [*fmt.bos_ids, *header], _NONE, _NONE, _NONE
        prefix_ids = encode(fmt, tokenizer, prefix[: len(prefix) - len(overhang)], continues=bool(header))
    else:
        overhang = ""
        head, prefix_ids, between, suffix_ids, tail = _fim_parts(fmt, tokenizer, path, prefix, suffix)
    room = budget - len(head) - len(between) - len(tail)
    if room < 1:
        raise PromptTooLong(
            f"the prompt's budget of {budget} tokens does not even hold its path",
            field="prompt.path",
            hint="Give a shorter path, or fewer max_tokens.",
        )
    suffix_room = min(len(suffix_ids), max(room // 4, room - len(prefix_ids)))
    prefix_room = room - suffix_room
    truncated |= len(prefix_ids) > prefix_room or len(suffix_ids) > suffix_room
    if len(prefix_ids) > prefix_room:
        stride = STRIDE if prefix_room > STRIDE else 1
        prefix_ids = prefix_ids[-(-(len(prefix_ids) - prefix_room) // stride) * stride :]
    suffix_ids = suffix_ids[:suffix_room]
    if fmt.style == "plain" or not suffix:
        ids = head + prefix_ids
    else:
        ids = _fim(fmt, head, prefix_ids, between, suffix_ids, tail)
    extra: list[int] = []
    for chunk_path, chunk in context:
        chunk_ids = _header(fmt, tokenizer, chunk_path) + encode(fmt, tokenizer, chunk.rstrip("\n") + "\n")
        if len(extra) + len(chunk_ids) + len(ids) <= budget:
            extra = chunk_ids + extra
    at = len(fmt.bos_ids)
    return Prompt(
        ids=ids[:at] + extra + ids[at:] or [fmt.eot_id],  # neither path nor prefix: what ends a text begins one
        suffix_used=bool(suffix_ids),
        truncated=truncated,
        overhang=overhang,
    )


def _without_markers(fmt: PromptFormat, text: str) -> list[str]:
    """The text in pieces, none of which contains a marker: each one is cut behind its first character."""
    if not fmt.control:
        return [text]
    cuts = [match.start() + 1 for match in re.finditer("|".join(map(re.escape, fmt.control)), text)]
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _header(fmt: PromptFormat, tokenizer: Tokenizer, path: str) -> list[int]:
    if not path:
        return []
    marker = [] if fmt.path_id is None else [fmt.path_id]
    return marker + encode(fmt, tokenizer, fmt.path_text.format(path=path), continues=bool(marker))


def _fim_parts(
    fmt: PromptFormat, tokenizer: Tokenizer, path: str, prefix: str, suffix: str
) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """(head, prefix, between, suffix, tail) of a fill-in-the-middle prompt; head, between and tail are never cut."""
    assert fmt.prefix_id is not None and fmt.suffix_id is not None
    header, prefix_ids = _header(fmt, tokenizer, path), encode(fmt, tokenizer, prefix, continues=False)
    suffix_ids = encode(fmt, tokenizer, suffix)
    middle = [] if fmt.middle_id is None else [fmt.middle_id]
    if fmt.style == "spm":
        return [*fmt.bos_ids, *header, fmt.suffix_id], prefix_ids, [fmt.prefix_id], suffix_ids, middle
    head = [fmt.prefix_id, *header] if fmt.path_inside else [*header, fmt.prefix_id]
    return [*fmt.bos_ids, *head], prefix_ids, [fmt.suffix_id], suffix_ids, middle


def _fim(
    fmt: PromptFormat, head: list[int], prefix: list[int], between: list[int], suffix: list[int], tail: list[int]
) -> list[int]:
    first, second = (suffix, prefix) if fmt.style == "spm" else (prefix, suffix)
    return head + first + between + second + tail


def _overhang(prefix: str) -> str:
    match = _LAST_WORD.search(prefix[-2 * OVERHANG_CHARS :])
    return match.group() if match and len(match.group()) <= OVERHANG_CHARS else ""
