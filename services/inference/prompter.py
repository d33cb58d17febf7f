"""Prompts of requests: from code or a conversation to token ids, off the event loop."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from services.core.errors import ChatUnsupported, InvalidArgument, PromptTooLong
from services.core.models import prompts
from services.core.models.prompts import Prompt, PromptFormat
from services.inference.languages import path_of

if TYPE_CHECKING:
    from services.inference.model import LoadedModel


@dataclass(frozen=True, slots=True)
class Code:
    """Code around a cursor."""

    path: str
    prefix: str
    suffix: str
    context: tuple[tuple[str, str], ...] = ()
    """(path, text) of other files, the most useful first."""
    language: str = ""
    """By linguist's name; tells it where there is no path."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    """system, user or assistant."""
    content: str


class Prompter:
    """Renders prompts in one thread: the tokenizer must not be used by two at once ("Already borrowed").

    Args:
        budget: most tokens of a completion's prompt.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    async def completion(self, model: LoadedModel, fmt: PromptFormat, code: Code, max_tokens: int) -> Prompt:
        """The prompt of a completion.

        Args:
            fmt: of the version that answers.

        Raises:
            PromptTooLong: max_tokens leave it no room.
        """
        # The overhang is generated anew, byte by byte at worst.
        budget = min(self._budget, model.context_length - max_tokens - 4 * prompts.OVERHANG_CHARS)
        return await asyncio.get_running_loop().run_in_executor(self._thread, _render, model, fmt, code, budget)

    async def scored(
        self, model: LoadedModel, fmt: PromptFormat, code: Code, continuation: str
    ) -> tuple[Prompt, list[int]]:
        """The prompt of a completion, and the ids of what it leaves out and of a continuation.

        Raises:
            PromptTooLong: the continuation leaves the prompt no room.
        """

        def render() -> tuple[Prompt, list[int]]:
            room = model.context_length - len(prompts.encode(fmt, model.tokenizer, continuation))
            if room <= 4 * prompts.OVERHANG_CHARS:
                raise PromptTooLong(
                    f"the continuation is too long for this model's context of {model.context_length} tokens",
                    field="continuation",
                    hint="Score it in parts.",
                )
            budget = min(self._budget, room - 4 * prompts.OVERHANG_CHARS)
            prompt = _render(model, fmt, code, budget)
            return prompt, prompts.encode(fmt, model.tokenizer, prompt.overhang + continuation)

        return await asyncio.get_running_loop().run_in_executor(self._thread, render)

    async def chat(self, model: LoadedModel, turns: Sequence[Turn], max_tokens: int) -> Prompt:
        """The prompt of a conversation, through the model's chat template.

        Raises:
            ChatUnsupported: the model has none.
            PromptTooLong: the conversation does not fit the model's context.
        """
        if not model.tokenizer.chat_template:
            raise ChatUnsupported(f"{model.base.model} has no chat template", hint="Serve an instruct model.")

        ids = await asyncio.get_running_loop().run_in_executor(self._thread, _render_chat, model, turns)
        if len(ids) > model.context_length - max_tokens:
            raise PromptTooLong(
                f"the conversation has {len(ids)} tokens, {model.context_length - max_tokens} fit",
                field="messages",
                hint="Leave out older messages, or ask for fewer tokens.",
            )
        return Prompt(ids=ids, suffix_used=False, truncated=False)


def _render(model: LoadedModel, fmt: PromptFormat, code: Code, budget: int) -> Prompt:
    return prompts.completion_prompt(
        fmt,
        model.tokenizer,
        path=path_of(code.path, code.language),
        prefix=code.prefix,
        suffix=code.suffix,
        budget=budget,
        context=code.context,
    )


def _render_chat(model: LoadedModel, turns: Sequence[Turn]) -> list[int]:
    """The template is rendered around stand-ins, so that markers in what people write stay text."""
    mark = uuid4().hex
    stand_ins = [{"role": turn.role, "content": f"{mark}-{number}-{mark}"} for number, turn in enumerate(turns)]
    try:
        rendered: str = model.tokenizer.apply_chat_template(stand_ins, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like, for roles out of order say
        raise InvalidArgument(
            f"the model's chat template refuses these messages: {error}", field="messages", hint="Alternate the roles."
        ) from None
    ids: list[int] = []
    for number, part in enumerate(re.split(f"{mark}-(\\d+)-{mark}", rendered)):
        if number % 2:
            ids += prompts.encode(model.format, model.tokenizer, turns[int(part)].content)
        elif part:
            ids += model.tokenizer.encode(part, add_special_tokens=False)
    return ids
