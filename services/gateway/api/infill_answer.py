"""The answer of /infill, with the fields that llama.vscode and llama.vim read.

https://github.com/ggml-org/llama.vscode/blob/3938fb35/src/types.ts (LlamaResponse),
https://github.com/ggml-org/llama.vim/blob/a1c8e6e4/autoload/llama.vim (response_fields)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from pydantic import ConfigDict

from codegraft.inference.v1 import completion_pb2 as pb
from services.gateway.api.asks import InfillAsk
from services.gateway.api.generation import Part

_STOPS = {
    pb.FINISH_REASON_END_OF_TEXT: "eos",
    pb.FINISH_REASON_STOP: "word",
    pb.FINISH_REASON_LENGTH: "limit",
}


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went; milliseconds, and tokens a second."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """What the request came to."""

    n_predict: int
    temperature: float
    stop: list[str]
    stream: bool


def _nothing_required(schema: dict[str, Any]) -> None:
    del schema["required"]


@dataclass(frozen=True, slots=True)
class InfillAnswer:
    """Answer of /infill; with response_fields only these."""

    __pydantic_config__: ClassVar = ConfigDict(json_schema_extra=_nothing_required)

    id: str
    """For /v1/feedback. Not in llama.cpp's."""
    content: str
    model: str
    system_fingerprint: str
    """Which version answered. Not in llama.cpp's."""
    tokens_predicted: int
    tokens_evaluated: int
    """Tokens of the prompt."""
    tokens_cached: int
    """Those that need not be computed again."""
    truncated: bool
    """Whether the prompt was cut to fit."""
    has_new_line: bool
    stop: bool
    """Whether it is the last: always, but in a stream's chunks."""
    stop_type: str
    """eos, word, limit or none."""
    stopping_word: str
    generation_settings: GenerationSettings
    timings: Timings

    @classmethod
    def of(
        cls, ask: InfillAsk, model: str, started: pb.Started, fingerprint: str, part: Part, seconds: float
    ) -> InfillAnswer:
        """The whole answer.

        Args:
            started: with an empty id when nothing was generated.
            seconds: since it began, where nobody measured better: a completion that was stopped has no end of its own.
        """
        measured = part.finished.timings if part.finished else pb.Timings(total_seconds=seconds)
        prompt_ms = measured.first_token_seconds * 1000
        predicted_ms = max(0.0, measured.total_seconds - measured.queue_seconds) * 1000 - prompt_ms
        computed = started.prompt_tokens - started.cached_tokens
        stop_type = _STOPS.get(part.finished.reason, "limit") if part.finished else "limit"
        return cls(
            id=f"cmpl-{started.completion_id}" if started.completion_id else "",
            content=part.text,
            model=model,
            system_fingerprint=fingerprint,
            tokens_predicted=part.tokens,
            tokens_evaluated=started.prompt_tokens,
            tokens_cached=started.cached_tokens,
            truncated=started.prompt_truncated,
            has_new_line="\n" in part.text,
            stop=True,
            stop_type=stop_type if started.completion_id else "none",
            stopping_word="",
            generation_settings=GenerationSettings(
                ask.n_predict, ask.temperature or 0.0, ask.stop or [], bool(ask.stream)
            ),
            timings=Timings(
                started.cached_tokens,
                computed,
                prompt_ms,
                _share(prompt_ms, computed),
                _share(computed * 1000, prompt_ms),
                part.tokens,
                predicted_ms,
                _share(predicted_ms, part.tokens),
                _share(part.tokens * 1000, predicted_ms),
            ),
        )

    def without_text(self) -> InfillAnswer:
        """The end of a stream, whose text was sent already."""
        return replace(self, content="")


@dataclass(frozen=True, slots=True)
class InfillChunk:
    """Some more text in a stream."""

    content: str
    tokens_predicted: int
    tokens_evaluated: int
    stop: bool = False


def chosen(answer: InfillAnswer, fields: Sequence[str] | None) -> InfillAnswer | dict[str, Any]:
    """The answer, or those fields of it under the names by which they were asked for; unknown ones are left out."""
    if not fields:
        return answer
    whole, picked = asdict(answer), dict[str, Any]()
    for name in fields:
        value: Any = whole
        for key in name.split("/"):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            picked[name] = value
    return picked


def _share(amount: float, of: float) -> float:
    return amount / of if of else 0.0
