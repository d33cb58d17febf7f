"""Answers, as OpenAI's clients read them. orjson writes dataclasses as they are; null stands for what is absent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from codegraft.inference.v1.completion_pb2 import Started
from services.gateway.api.generation import FinishReason, Part


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens used."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens

    @classmethod
    def of(cls, started: Started, parts: Sequence[Part]) -> Usage:
        """Of one answer. The prompt counts once: several completions share it."""
        prompt, generated = started.prompt_tokens, sum(_tokens(part) for part in parts)
        return cls(prompt, generated, prompt + generated, PromptTokens(started.cached_tokens))


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Where the prompt's tokens came from."""

    cached_tokens: int
    """Those that need not be computed again."""


@dataclass(frozen=True, slots=True)
class TextLogprobs:
    """Log-probabilities of a text's tokens."""

    tokens: list[str]
    """Their texts; part of a character is written as bytes:\\xe2\\x96."""
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]
    """Where each begins in the text, in characters."""


@dataclass(frozen=True, slots=True)
class TextChoice:
    """One of the completions, or some more of its text."""

    text: str
    index: int
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    codegraft_reason: str | None
    """END_OF_TEXT, STOP, LENGTH, DEADLINE or SUPERSEDED."""


@dataclass(frozen=True, slots=True)
class TextCompletion:
    """Answer of /v1/completions, or a chunk of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    """Seconds since 1970."""
    model: str
    system_fingerprint: str
    """Base model, plus sign, SHA-256 of the adapter that answered or "base"."""
    choices: list[TextChoice]
    usage: Usage | None


@dataclass(frozen=True, slots=True)
class TopToken:
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopToken]


@dataclass(frozen=True, slots=True)
class ChatLogprobs:
    """Log-probabilities of a message's tokens."""

    content: list[TokenInfo]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """The model's message."""

    role: Literal["assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class ChatChoice:
    """One of the answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    codegraft_reason: str | None
    """END_OF_TEXT, STOP, LENGTH, DEADLINE or SUPERSEDED."""


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """Answer of /v1/chat/completions and of /v1/fim/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    """Seconds since 1970."""
    model: str
    system_fingerprint: str
    """Base model, plus sign, SHA-256 of the adapter that answered or "base"."""
    choices: list[ChatChoice]
    usage: Usage


@dataclass(frozen=True, slots=True)
class Delta:
    """Some more of a message."""

    role: Literal["assistant"] | None
    """In the first one."""
    content: str | None


@dataclass(frozen=True, slots=True)
class DeltaChoice:
    """Some more of one of the answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    codegraft_reason: str | None


@dataclass(frozen=True, slots=True)
class ChatChunk:
    """One event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[DeltaChoice]
    usage: Usage | None


def _tokens(part: Part) -> int:
    return part.finished.usage.completion_tokens if part.finished else part.tokens
