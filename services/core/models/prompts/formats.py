"""What a prompt format consists of, and what of a tokenizer it is told by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Style = Literal["psm", "spm", "continued", "plain"]
"""psm: prefix, suffix, middle. spm: suffix, prefix, middle. continued: suffix, then the text as a plain document, which
the middle continues in the middle of a word if need be. plain: no fill-in-the-middle."""

PathPlace = Literal["before", "inside", "around"]
"""Where the file's path stands: before the prefix marker, behind it, or its marker before and its text behind it."""

SENTINELS = "sentinels"
"""Name of the format of an adapter that was taught to fill in the middle, on a base that cannot."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def all_special_tokens(self) -> list[str]: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...

    @property
    def chat_template(self) -> Any: ...

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
    end_of_middle_id: int
    """Ends a middle."""
    stop_ids: tuple[int, ...]
    """Any of these ends a completion: no text of a file contains them."""
    path_id: int | None
    """Marker before the path; None when the path is a comment line."""
    path_text: str
    """The path's line, with ``{path}``."""
    path_place: PathPlace
    """Of a fill-in-the-middle prompt; a document begins with its path."""
    control: tuple[str, ...]
    """Strings that the tokenizer would read as markers; in a file they are only text."""
    joins_with_space: bool
    """Whether the tokenizer puts a space before every text it is given (SentencePiece)."""
    spare: tuple[tuple[str, int], ...]
    """Special tokens, with their ids, that nothing uses."""
    sentinels: tuple[str, ...] = ()
    """Of the spare tokens those that mark prefix and suffix here; empty when the markers are the base model's own."""

    @property
    def fills_in_the_middle(self) -> bool:
        """Whether a suffix can be part of a prompt."""
        return self.style != "plain"
