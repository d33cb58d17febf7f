"""One completion on its way through the engine. Imports no torch."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from services.inference.engine.blocks import Table
from services.inference.engine.speculate import Drafter
from services.inference.engine.text import TextStream

_numbers = itertools.count(1)


class Reason(StrEnum):
    """Why a sequence ended."""

    END_OF_TEXT = "END_OF_TEXT"
    STOP = "STOP"
    LENGTH = "LENGTH"
    DEADLINE = "DEADLINE"
    SUPERSEDED = "SUPERSEDED"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; the defaults are greedy decoding."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus: the smallest set of tokens with this probability."""
    top_k: int = 0
    """Only the k likeliest; 0 means all."""
    min_p: float = 0.0
    """Only tokens at least this likely relative to the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens seen before, multiplies negative ones (CTRL, arXiv:1909.05858)."""
    seed: int | None = None
    """Same seed, same completion; None draws one."""
    logprobs: int | None = None
    """Each token comes with its log-probability and those of so many likeliest ones; None for neither."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """What the model thinks of a token, before temperature and filters."""

    token: int
    logprob: float
    """Natural logarithm of its probability."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at its place and theirs, the likeliest first."""


@dataclass(frozen=True, slots=True)
class Result:
    """What the runner gives for a sequence after a step."""

    tokens: tuple[int, ...]
    """Its next tokens, one more than its guesses that were right; none for one that is only scored."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of these tokens, if wanted; of the targets that the step reached."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a step brought for one sequence."""

    started: bool = False
    """Whether this is the sign that the first step has begun; the engine sets nothing else then."""
    text: str = ""
    """New text, whole characters only."""
    tokens: int = 0
    """Tokens that the text stands for, and those held back before it."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Theirs, if wanted; of one that is only scored all targets', in the last output."""
    reason: Reason | None = None
    """Set on the last output."""

    def followed_by(self, later: Output) -> Output:
        """This and the next output of the same sequence as one."""
        return Output(
            started=self.started or later.started,
            text=self.text + later.text,
            tokens=self.tokens + later.tokens,
            logprobs=self.logprobs + later.logprobs,
            reason=later.reason,
        )


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, their limits, and how far the keys and values are."""

    prompt: list[int]
    """Prompt token ids, at least one."""
    max_tokens: int
    """Most new tokens; those that only repeat the overhang do not count."""
    text: TextStream
    """Turns tokens into text and finds its end."""
    deliver: Callable[[Output], None]
    """Called from the engine's thread."""
    sampling: Sampling = Sampling()
    adapter: Any = None
    """The weights this sequence runs on to its end; None for the base model. The engine hands them through, and keeps
    apart what they computed by their ``digest``."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the text."""
    deadline: float | None = None
    """On the monotonic clock, seconds."""
    project: str = ""
    """Whose it is; places are shared out between projects."""
    generation: int = 0
    """Another one for each project that has the name."""
    session: str = ""
    """A newer sequence of the same session takes this one's place."""
    targets: tuple[int, ...] = ()
    """When there are any, nothing is generated: what is told is how likely each of these tokens is behind those before
    it. All but the last are the prompt's end, so that the outputs at its last ``len(targets)`` tokens say it."""
    after: Sequence | None = None
    """One with the same prompt: this one waits until that has computed it, to share its blocks."""

    number: int = field(default_factory=lambda: next(_numbers))
    """Unique in this process."""
    tokens: list[int] = field(init=False)
    """Prompt and what was generated."""
    computed: int = field(default=0, init=False)
    """Tokens whose keys and values are there."""
    table: Table | None = field(default=None, init=False)
    """The blocks they are in; None while it waits."""
    cached: int | None = field(default=None, init=False)
    """Prompt tokens that were there already when it was admitted; None before."""
    generated: int = field(default=0, init=False)
    """New tokens that count towards max_tokens."""
    unsent: int = field(default=0, init=False)
    """Generated tokens whose text is held back."""
    logprobs: list[TokenLogprob] = field(default_factory=list, init=False)
    """Of the unsent tokens, or of the targets so far."""
    drafter: Drafter = field(default_factory=Drafter, init=False)
    """Guesses what comes next."""
    cancelled: Reason | None = field(default=None, init=False)
    """Set when it is to end before its next step."""
    submit_time: float = field(default=0.0, init=False)
    """All on the monotonic clock, seconds."""
    start_time: float | None = field(default=None, init=False)
    """Begin of its first step."""
    first_token_time: float | None = field(default=None, init=False)
    """End of the step that gave its first token."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("a sequence needs at least one prompt token")
        self.tokens = list(self.prompt)

    @property
    def root(self) -> bytes:
        """Stands for its project and its weights, so that it never finds keys and values of others.

        Of another project not even those of the base model: how soon its prompt is through, and how much of it was
        cached, would tell it what the other one has asked.
        """
        weights = "" if self.adapter is None else self.adapter.digest
        return hashlib.sha256(f"{self.project}\0{self.generation}\0{weights}".encode()).digest()

    @property
    def capacity(self) -> int:
        """Most tokens it can come to."""
        return len(self.prompt) + self.max_tokens + self.text.overhang_size

    @property
    def reusable(self) -> int:
        """Tokens whose keys and values are enough; from there on their outputs are needed."""
        return len(self.tokens) - max(1, len(self.targets))

    @property
    def remaining(self) -> int:
        """Tokens that wait for their keys and values; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def draftable(self) -> int:
        """How many tokens may be guessed: after all of them one more has to fit in. None while it repeats an overhang,
        when only that is allowed."""
        if self.targets or self.text.overhang.left:
            return 0
        return max(0, min(self.max_tokens - self.generated, self.capacity - len(self.tokens)) - 1)

    def take(self, result: Result) -> Output | None:
        """Takes what a step gave; None while there is nothing new to tell.

        What comes behind a token that ends the text does not count.
        """
        if self.targets:
            self.logprobs += result.logprobs
            return self.close(Reason.LENGTH) if len(self.logprobs) == len(self.targets) else None
        text = ""
        for at, token in enumerate(result.tokens):
            new, reason = self._accept(token, result.logprobs[at : at + 1])
            text += new
            if reason is not None:
                return self.close(reason, before=text)
        return self._output(text) if text else None

    def _accept(self, token: int, logprobs: tuple[TokenLogprob, ...]) -> tuple[str, Reason | None]:
        """Takes one new token: its text, and whether it is the last. A stop token is neither text nor counted."""
        if token in self.stop_ids:
            return "", Reason.END_OF_TEXT
        self.tokens.append(token)
        text = self.text.push(token)
        if not self.text.repeating:
            self.generated += 1
            self.unsent += 1
            self.logprobs += logprobs
        if self.text.stopped:
            return text, Reason.STOP
        if self.generated >= self.max_tokens or len(self.tokens) >= self.capacity:
            return text, Reason.LENGTH
        return text, None

    def close(self, reason: Reason, before: str = "") -> Output:
        """The last output: what was held back comes with it."""
        return self._output(before + self.text.flush(), reason)

    def _output(self, text: str, reason: Reason | None = None) -> Output:
        tokens, logprobs = self.unsent, tuple(self.logprobs)
        self.unsent, self.logprobs = 0, []
        return Output(text=text, tokens=tokens, logprobs=logprobs, reason=reason)
