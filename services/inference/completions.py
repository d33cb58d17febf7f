"""Completions: from a request to the stream of its parts."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.core import log
from services.core.errors import (
    DeadlineExceeded,
    InternalError,
    ModelLoading,
    ProjectNotFound,
    ShuttingDown,
    Unavailable,
)
from services.core.models.prompts import Prompt, PromptFormat
from services.inference.adapters.follower import Follower
from services.inference.adapters.loader import Loader
from services.inference.adapters.registry import Pin, Registry
from services.inference.engine import sequence as engine
from services.inference.engine.text import TextStream, suffix_stop
from services.inference.policy import Projects
from services.inference.prompter import Code, Prompter, Turn

if TYPE_CHECKING:
    from services.inference.model import LoadedModel

_log = log.get("inference.completions")
_RETRY_LOADING = 2.0
_POLICY_WAIT = 5.0
"""Seconds that a project's first completion waits for its policy; then the base model answers."""


@dataclass(frozen=True, slots=True)
class Stop:
    """When generation ends."""

    max_tokens: int = 64
    strings: tuple[str, ...] = ()
    single_line: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One completion or chat."""

    project: str
    prompt: Code | Sequence[Turn]
    sampling: engine.Sampling = field(default_factory=engine.Sampling)
    stop: Stop = Stop()
    base: bool = False
    """The base model answers, whatever the policy says."""
    checkpoint: str = ""
    """This checkpoint answers, whatever the policy says."""
    session: str = ""
    deadline: float | None = None
    """On the monotonic clock, seconds; the text so far is delivered when it passes."""


@dataclass(frozen=True, slots=True)
class Started:
    """The first part: what answers, to the end."""

    completion_id: str
    model: str
    adapter_sha256: str
    checkpoint: str
    prompt: Prompt
    cached_tokens: int
    """Prompt tokens that were not computed again."""


@dataclass(frozen=True, slots=True)
class Delta:
    """Some more text."""

    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The last part."""

    reason: engine.Reason
    prompt_tokens: int
    completion_tokens: int
    queue_seconds: float
    first_token_seconds: float
    total_seconds: float


class Completions:
    """Answers requests with whatever model and adapters this replica holds.

    Args:
        model: becomes the loaded model.
        load_wait: seconds that a request waits for it.
    """

    def __init__(
        self,
        *,
        model: asyncio.Future[LoadedModel],
        registry: Registry,
        follower: Follower,
        loader: Loader,
        projects: Projects,
        prompter: Prompter,
        load_wait: float,
    ) -> None:
        self._model, self._registry, self._follower, self._loader = model, registry, follower, loader
        self._projects, self._prompter, self._load_wait = projects, prompter, load_wait

    @property
    def loaded(self) -> LoadedModel | None:
        """The model, once it is loaded."""
        done = self._model.done() and not self._model.cancelled() and self._model.exception() is None
        return self._model.result() if done else None

    async def run(self, request: Request) -> AsyncGenerator[Started | Delta | Finished, None]:
        """The parts of one answer. Closing the iterator ends the generation within a step.

        Raises:
            ProjectNotFound, CheckpointNotFound, ModelLoading, QueueFull, PromptTooLong, ChatUnsupported, ShuttingDown,
            AdapterRejected: before the first part.
            DeadlineExceeded: the deadline passed before the first step.
        """
        if not await self._projects.exists(request.project):
            raise ProjectNotFound(
                f"no project {request.project}", field="parent", hint="Create the project first.", name=request.project
            )
        model = await self._loaded(request.deadline)
        pin = await self._pin(model, request)
        inbox: asyncio.Queue[engine.Output] = asyncio.Queue()
        try:
            # The version that answers says how it wants its prompts.
            fmt = (pin.version.format if pin.version else None) or model.format
            prompt = await self._prompt(model, fmt, request)
            sequence = self._sequence(model, fmt, request, prompt, pin, inbox)
            model.engine.submit(sequence)
        except BaseException:
            pin.release()
            raise
        version, started, ended = pin.version, False, False
        try:
            while not ended:
                output = await inbox.get()
                ended = output.reason is not None
                _raise_if_broken(output.reason, sequence)
                if not started:  # also for one that was superseded in the queue
                    started = True
                    yield Started(
                        completion_id=uuid.uuid4().hex,
                        model=model.base.model,
                        adapter_sha256=version.sha256 if version else "",
                        checkpoint=version.checkpoint if version else "",
                        prompt=prompt,
                        cached_tokens=sequence.cached or 0,
                    )
                if output.text:
                    yield Delta(output.text, output.tokens)
                if output.reason is not None:
                    yield _finished(sequence, output.reason)
        finally:
            if not ended:
                model.engine.cancel(sequence)

    async def _loaded(self, deadline: float | None) -> LoadedModel:
        wait = self._load_wait
        if deadline is not None:
            wait = min(wait, deadline - time.monotonic())
        try:
            return await asyncio.wait_for(asyncio.shield(self._model), max(wait, 0.0))
        except TimeoutError:
            raise ModelLoading(
                "the model is still being loaded", hint="Try again in a moment.", retry_after=_RETRY_LOADING
            ) from None

    async def _prompt(self, model: LoadedModel, fmt: PromptFormat, request: Request) -> Prompt:
        if isinstance(request.prompt, Code):
            return await self._prompter.completion(model, fmt, request.prompt, request.stop.max_tokens)
        return await self._prompter.chat(model, request.prompt, request.stop.max_tokens)

    async def _pin(self, model: LoadedModel, request: Request) -> Pin:
        if request.base:
            return self._registry.pin_base(request.project)
        if request.checkpoint:
            version = await self._loader.load(request.checkpoint, model)
            return self._registry.pin_version(request.project, version)
        try:
            async with asyncio.timeout(_POLICY_WAIT):
                await self._follower.ensure(request.project)
        except (Unavailable, TimeoutError) as error:  # without NATS completions go on
            _log.warning("the policy cannot be read, serving what is there", project=request.project, error=str(error))
        return self._registry.pin(request.project)

    def _sequence(
        self,
        model: LoadedModel,
        fmt: PromptFormat,
        request: Request,
        prompt: Prompt,
        pin: Pin,
        inbox: asyncio.Queue[engine.Output],
    ) -> engine.Sequence:
        loop = asyncio.get_running_loop()

        def deliver(output: engine.Output) -> None:
            if output.reason is not None:
                pin.release()
            try:
                loop.call_soon_threadsafe(inbox.put_nowait, output)
            except RuntimeError:  # the loop is closed: nobody listens any more
                _log.debug("an output came after the end of the loop")

        # An adapter that was taught sentinels in a short run does not end where the suffix begins: of expressions in
        # a line 35 % are exact with this stop, none without (bench/fim.py).
        ends_at_suffix = not prompt.suffix_used or bool(fmt.sentinels)
        suffix = request.prompt.suffix if isinstance(request.prompt, Code) and ends_at_suffix else ""
        return engine.Sequence(
            prompt=prompt.ids,
            max_tokens=request.stop.max_tokens,
            text=TextStream(
                model.vocabulary,
                stop=request.stop.strings,
                suffix_stop=suffix_stop(suffix),
                single_line=request.stop.single_line,
                overhang=prompt.overhang,
            ),
            deliver=deliver,
            sampling=request.sampling,
            adapter=pin.version.weights if pin.version else None,
            stop_ids=frozenset(fmt.stop_ids),
            deadline=request.deadline,
            session=f"{request.project}/{request.session}" if request.session else "",
        )


def _raise_if_broken(reason: engine.Reason | None, sequence: engine.Sequence) -> None:
    if reason is engine.Reason.FAILED:
        raise InternalError("the engine failed on this completion")
    if reason is engine.Reason.CANCELLED:
        raise ShuttingDown("this replica is shutting down", retry_after=0.5)
    if reason is engine.Reason.DEADLINE and sequence.start_time is None:
        raise DeadlineExceeded("the deadline passed in the queue", hint="Give more time, or run more replicas.")


def _finished(sequence: engine.Sequence, reason: engine.Reason) -> Finished:
    now = time.monotonic()
    started = sequence.start_time if sequence.start_time is not None else now
    first = sequence.first_token_time
    return Finished(
        reason=reason,
        prompt_tokens=len(sequence.prompt),
        completion_tokens=sequence.generated,
        queue_seconds=started - sequence.submit_time,
        first_token_seconds=(first - started) if first is not None else 0.0,
        total_seconds=now - sequence.submit_time,
    )
