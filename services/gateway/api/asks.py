"""Bodies of requests, as OpenAI's and llama.cpp's clients send them. What is not named here is accepted and ignored.

https://platform.openai.com/docs/api-reference/completions, …/chat, https://docs.mistral.ai/api (fim/completions)
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from codegraft.inference.v1.completion_pb2 import Sampling
from services.core.errors import InvalidArgument

_Name = Annotated[str, Field(max_length=300)]
_Text = Annotated[str, Field(max_length=3 << 20)]
_Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Count = Annotated[int, Field(ge=-(2**31), lt=2**31)]
_MOST_LOGPROBS = 20
"""Likeliest tokens that inference tells with each token."""


class Body(BaseModel):
    """A body, or a part of one. The docstrings under its fields are what /openapi.json says of them."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class StreamOptions(Body):
    """What a stream tells besides text."""

    include_usage: bool | None = False
    """A last chunk with the tokens used."""


class ResponseFormat(Body):
    """Which form the text has to have."""

    type: _Name = "text"
    """text, json_object and so on."""


class Ask(Body):
    """What every request for generated text may say. A field that is null counts as left out."""

    model: _Name = ""
    """See /v1/models; empty for the project's alias."""
    max_tokens: _Count | None = None
    """New tokens at most, 1 to 4096; 64 when left out."""
    max_completion_tokens: _Count | None = None
    """What newer clients call max_tokens."""
    temperature: float | None = None
    """0 to 2. Left out it is 0: an editor's suggestion should not depend on luck."""
    top_p: float | None = None
    """Nucleus, above 0 to 1."""
    top_k: _Count | None = None
    """Only so many of the likeliest tokens. Not in OpenAI's API, as the next two."""
    min_p: float | None = None
    """Least probability relative to the likeliest."""
    repetition_penalty: float | None = None
    """Divides the logits of tokens that were there before, 0.5 to 2."""
    n: _Count | None = None
    """Completions of the prompt, 1 to 8."""
    seed: _Seed | None = None
    """The same seed gives the same text."""
    stop: str | list[str] | None = None
    """Strings before which generation stops, at most 16."""
    stream: bool | None = False
    """Server-sent events instead of one answer."""
    stream_options: StreamOptions | None = None
    """With stream only."""
    user: _Name | None = None
    """Editor session, where no X-Codegraft-Session header says it: its newer request drops the older one."""
    frequency_penalty: float | None = None
    """Only 0 is supported."""
    presence_penalty: float | None = None
    """Only 0 is supported."""
    logit_bias: dict[str, float] | None = None
    """Not supported."""
    response_format: ResponseFormat | None = None
    """Only text is supported."""

    def sampling(self, logprobs: int | None = None) -> Sampling:
        """How tokens are chosen."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            n=self.n,
            logprobs=logprobs,
        )

    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def most_tokens(self) -> int | None:
        """New tokens at most."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def refuse_unsupported(self) -> None:
        """Refuses what would otherwise be ignored silently and change the answer.

        Raises:
            InvalidArgument: names the field.
        """
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(self, name):
                raise InvalidArgument(f"{name} is not supported", field=name, hint="Leave it out.")
        if self.response_format and self.response_format.type != "text":
            raise InvalidArgument(
                "answers cannot be held to a format", field="response_format", hint="Leave it out, or ask for text."
            )


class CompletionAsk(Ask):
    """Body of /v1/completions."""

    prompt: _Text | list[_Text] = ""
    """Text before the cursor; a list may hold one."""
    suffix: _Text | None = None
    """Text after the cursor: the model fills in the middle."""
    path: _Name | None = None
    """Path of the file in its repository. Not in OpenAI's API: the adapter was trained with it."""
    logprobs: _Count | None = None
    """So many likeliest tokens with each token, 0 to 20."""
    echo: bool | None = False
    """Not supported."""
    best_of: _Count | None = None
    """Only n is supported."""

    @field_validator("logprobs", mode="before")
    @classmethod
    def _false_is_none(cls, value: object) -> object:
        return None if value is False else value  # as chat has it

    def before(self) -> str:
        """The text before the cursor.

        Raises:
            InvalidArgument: there are several.
        """
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) != 1:
            raise InvalidArgument("prompt is a list of several", field="prompt", hint="Send one request for each.")
        return self.prompt[0]

    def refuse_unsupported(self) -> None:
        """See :meth:`Ask.refuse_unsupported`."""
        super().refuse_unsupported()
        if self.echo:
            raise InvalidArgument("echo is not supported", field="echo", hint="Put the prompt before the text.")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidArgument("best_of is not supported", field="best_of", hint="Use n, and choose.")


class FimAsk(Ask):
    """Body of /v1/fim/completions, which is Mistral's: Continue asks so for code between a prefix and a suffix."""

    prompt: _Text = ""
    """Text before the cursor."""
    suffix: _Text | None = None
    """Text after the cursor."""
    path: _Name | None = None
    """Path of the file in its repository."""
    random_seed: _Seed | None = None
    """What Mistral calls seed."""

    def sampling(self, logprobs: int | None = None) -> Sampling:
        """See :meth:`Ask.sampling`."""
        found = super().sampling(logprobs)
        if self.random_seed is not None:
            found.seed = self.random_seed
        return found


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    """Text is all that models here read."""
    text: _Text
    """The text."""


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    """Who says it."""
    content: _Text | list[TextPart]
    """What is said."""

    def text(self) -> str:
        """The whole text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatAsk(Ask):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    """The conversation so far; the last message is the user's."""
    logprobs: bool | None = False
    """Log-probabilities of the tokens."""
    top_logprobs: _Count | None = None
    """So many likeliest tokens with each token, 0 to 20; with logprobs."""
    tools: list[object] | None = None
    """Not supported."""
    functions: list[object] | None = None
    """Not supported."""

    def refuse_unsupported(self) -> None:
        """See :meth:`Ask.refuse_unsupported`."""
        super().refuse_unsupported()
        if not 0 <= (self.top_logprobs or 0) <= _MOST_LOGPROBS:
            raise InvalidArgument(
                f"top_logprobs is {self.top_logprobs}", field="top_logprobs", hint=f"Use 0 to {_MOST_LOGPROBS}."
            )
        for name in ("tools", "functions"):
            if getattr(self, name):
                raise InvalidArgument(f"{name} are not supported", field=name, hint="Leave them out.")


class Chunk(Body):
    """Code of another file."""

    filename: _Name = ""
    """Its path."""
    text: _Text = ""
    """The code."""


class InfillAsk(Body):
    """Body of /infill, which is llama.cpp's. Samplers, caching, n_cmpl (more completions than the likeliest) and the
    like are accepted and ignored."""

    input_prefix: _Text = ""
    """Text before the cursor's line."""
    input_suffix: _Text = ""
    """Text after the cursor."""
    input_extra: list[Chunk] = Field(default=[], max_length=1000)
    """Code of other files, the most useful last."""
    prompt: _Text = ""
    """The cursor's line up to the cursor."""
    n_predict: _Count = -1
    """New tokens at most; below 0 means 128, 0 generates nothing."""
    t_max_predict_ms: _Count = 0
    """Milliseconds after the first token after which generation stops, once there is a whole line; 0 for none."""
    temperature: float | None = None
    """Left out the likeliest tokens are taken, whatever the samplers are."""
    top_k: _Count | None = None
    """With a temperature only, as top_p and min_p."""
    top_p: float | None = None
    """Nucleus, above 0 to 1."""
    min_p: float | None = None
    """Least probability relative to the likeliest."""
    seed: _Seed | None = None
    """The same seed gives the same text; -1 is any."""
    stop: list[str] | None = None
    """Strings before which generation stops."""
    stream: bool | None = False
    """Server-sent events instead of one answer."""
    response_fields: list[str] | None = Field(default=None, max_length=100)
    """Only these fields of the answer; one within another is written with a slash, and answered so."""
    model: _Name | None = None
    """See /v1/models; left out for the project's alias."""


class FeedbackAsk(Body):
    """Body of /v1/feedback."""

    completion_id: _Name
    """Id of the answer, as it came."""
    event: Literal["shown", "accepted", "rejected", "edited"]
    """What became of it. accepted and rejected stand for shown, edited for shown and accepted."""
    accepted_characters: int = Field(default=0, ge=0, le=1_000_000)
    """accepted: characters that were taken. edited: characters that were left of them."""
    text: str = Field(default="", max_length=20_000)
    """shown, rejected: the text that was shown. accepted: what was taken of it. edited: what was left of it. Kept only
    where the project says so; counting does not need it."""
    model: _Name = ""
    """The answer's model; it says which project it is about, as for completions."""
