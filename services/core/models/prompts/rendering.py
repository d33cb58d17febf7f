"""Documents to train on, and prompts to complete: the same ids for the same place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from services.core.errors import PromptTooLong
from services.core.models.prompts.formats import PromptFormat, Tokenizer
from services.core.models.prompts.text import encode

STRIDE = 128
"""Tokens by which is cut what stands before the cursor's line: a too long prefix, a suffix in front of it, the room of
other files. While an editor types, the prompt begins alike for a stride, so that cached keys and values stay valid."""

OVERHANG_CHARS = 64
"""A longer run at the cursor is not held back for healing."""

_CONTEXT_CHARS_PER_TOKEN = 16
"""Upper bound used to cut huge texts before they are tokenized."""
_LAST_WORD = re.compile(r"(\s+| ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+)\Z")  # as GPT-2's pre-tokenizer splits


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

    A document's words were tokenized whole. Behind a cut word, or behind a newline whose indentation is still to come,
    a model that continues a document would be off; so the last word or blank run is generated anew, constrained to
    begin with what is there (token healing). A middle behind a marker of its own begins anywhere."""
    overhang_ids: tuple[int, ...] = ()
    """How the tokenizer spells the overhang, of blanks with a word behind them: what goes beyond it is no matter.

    Blanks are grouped by how many there are, so a model that knows only whole documents gives a part of a group no
    sensible likelihood: three line ends one by one come from it when it means that one is all. So blanks are spelled
    like this or by a token that goes on; a word may be cut anywhere, and this is only how it most likely is."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """What stands around prefix and suffix; none of it is ever cut."""

    head: list[int]
    between: list[int]
    tail: list[int]
    suffix_first: bool

    def fill(self, prefix: list[int], suffix: list[int]) -> list[int]:
        first, second = (suffix, prefix) if self.suffix_first else (prefix, suffix)
        return self.head + first + self.between + second + self.tail

    def __len__(self) -> int:
        return len(self.head) + len(self.between) + len(self.tail)


def training_document(
    fmt: PromptFormat, tokenizer: Tokenizer, *, path: str, text: str, is_end: bool = True
) -> list[int]:
    """Ids of a file, left to right: path, text, end of text.

    Args:
        is_end: whether the text goes to the end of the file; if not, no end of text is put there.
    """
    header = _header(fmt, tokenizer, path)
    ids = [*fmt.bos_ids, *header, *encode(fmt, tokenizer, text, continues=bool(header))]
    return [*ids, fmt.eot_id] if is_end else ids


def training_fim(
    fmt: PromptFormat, tokenizer: Tokenizer, *, path: str, prefix: str, middle: str, suffix: str
) -> list[int]:
    """Ids of a file with its middle to be filled in, in serving order, then the middle and its end.

    A plain format, or an empty suffix, gives the document up to the middle's end.
    """
    if not fmt.fills_in_the_middle or not suffix:
        return training_document(fmt, tokenizer, path=path, text=prefix + middle)
    frame, suffix_ids = _frame(fmt, tokenizer, path), encode(fmt, tokenizer, suffix)
    if fmt.style == "continued":
        return [*frame.fill(_prefix_ids(fmt, tokenizer, path, prefix + middle), suffix_ids), fmt.end_of_middle_id]
    ids = frame.fill(_prefix_ids(fmt, tokenizer, path, prefix), suffix_ids)
    return [*ids, *encode(fmt, tokenizer, middle), fmt.end_of_middle_id]


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
    suffix = suffix[:limit] if fmt.fills_in_the_middle else ""
    overhang = _overhang(prefix) if _continues_a_document(fmt, suffix) else ""
    if overhang == prefix and not path and not suffix:
        overhang = ""  # something must be there to continue
    if suffix:
        frame, suffix_ids = _frame(fmt, tokenizer, path), encode(fmt, tokenizer, suffix)
        continues = _continues_in_frame(fmt, path)
    else:
        header = _header(fmt, tokenizer, path)
        frame, suffix_ids, continues = _Frame([*fmt.bos_ids, *header], [], [], suffix_first=False), [], bool(header)
    prefix_ids, spelled = encode(fmt, tokenizer, prefix, continues=continues), list[int]()
    if overhang:
        # Cut from the ids: how blanks before a word are grouped depends on the word.
        end = encode(fmt, tokenizer, overhang)
        spelled = encode(fmt, tokenizer, overhang + "x") if overhang.isspace() else end
        whole = prefix_ids[-len(end) :] == end
        kept = prefix[: len(prefix) - len(overhang)]
        prefix_ids = prefix_ids[: -len(end)] if whole else encode(fmt, tokenizer, kept, continues=continues)
    room = budget - len(frame)
    if room < 1:
        raise PromptTooLong(
            f"the prompt's budget of {budget} tokens does not even hold its path",
            field="prompt.path",
            hint="Give a shorter path, or fewer max_tokens.",
        )
    suffix_room, left = len(suffix_ids), room - len(prefix_ids)
    if suffix_room > left:
        suffix_room = min(suffix_room, max(room // 4, _in_strides(left, room) if frame.suffix_first else left))
    prefix_room = room - suffix_room
    truncated |= len(prefix_ids) > prefix_room or len(suffix_ids) > suffix_room
    if len(prefix_ids) > prefix_room:
        stride = STRIDE if prefix_room > STRIDE else 1
        prefix_ids = prefix_ids[-(-(len(prefix_ids) - prefix_room) // stride) * stride :]
    suffix_ids = suffix_ids[:suffix_room]
    ids = frame.fill(prefix_ids, suffix_ids)
    extra, context_room = list[int](), _in_strides(budget - len(ids), room)
    for chunk_path, chunk in context:
        chunk_ids = _header(fmt, tokenizer, chunk_path) + encode(fmt, tokenizer, chunk.rstrip("\n") + "\n")
        if len(extra) + len(chunk_ids) <= context_room:
            extra = chunk_ids + extra
    at = len(fmt.bos_ids)
    return Prompt(
        ids=ids[:at] + extra + ids[at:] or [fmt.eot_id],  # neither path nor prefix: what ends a text begins one
        suffix_used=bool(suffix_ids),
        truncated=truncated,
        overhang=overhang,
        overhang_ids=tuple(spelled),
    )


def _in_strides(left: int, room: int) -> int:
    """Tokens of what is left that are used: whole strides, unless there is room for less than one."""
    return left // STRIDE * STRIDE if room > STRIDE else left


def _header(fmt: PromptFormat, tokenizer: Tokenizer, path: str) -> list[int]:
    """The path's line before a document."""
    if not path:
        return []
    marker = [] if fmt.path_id is None else [fmt.path_id]
    return marker + encode(fmt, tokenizer, fmt.path_text.format(path=path), continues=bool(marker))


def _frame(fmt: PromptFormat, tokenizer: Tokenizer, path: str) -> _Frame:
    assert fmt.prefix_id is not None and fmt.suffix_id is not None
    header = _header(fmt, tokenizer, path)
    match fmt.path_place:
        case "before":
            before, behind = header, list[int]()
        case "inside":
            before, behind = [], header
        case "around":
            before, behind = header[:1], header[1:]
    tail = [] if fmt.middle_id is None else [fmt.middle_id]
    if fmt.style == "psm":
        return _Frame([*fmt.bos_ids, *before, fmt.prefix_id, *behind], [fmt.suffix_id], tail, suffix_first=False)
    return _Frame([*fmt.bos_ids, *before, fmt.suffix_id], [fmt.prefix_id, *behind], tail, suffix_first=True)


def _prefix_ids(fmt: PromptFormat, tokenizer: Tokenizer, path: str, prefix: str) -> list[int]:
    """The prefix of a fill-in-the-middle prompt."""
    return encode(fmt, tokenizer, prefix, continues=_continues_in_frame(fmt, path))


def _continues_in_frame(fmt: PromptFormat, path: str) -> bool:
    """Whether text stands before the prefix of a fill-in-the-middle prompt; behind a marker it begins as a text."""
    return bool(path) and fmt.path_place != "before"


def _continues_a_document(fmt: PromptFormat, suffix: str) -> bool:
    """Whether what is generated continues tokens that training has only seen joined to what follows them."""
    if fmt.style in ("plain", "continued"):
        return True
    # SentencePiece merges across words: what is held back would change the tokens before it.
    return not suffix and not fmt.joins_with_space


def _overhang(prefix: str) -> str:
    match = _LAST_WORD.search(prefix[-2 * OVERHANG_CHARS :])
    return match.group() if match and len(match.group()) <= OVERHANG_CHARS else ""
