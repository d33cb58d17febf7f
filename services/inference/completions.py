"""Completions: from a request to the stream of its parts."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from services.core import log
from services.core.auth.caller import current
from services.core.errors import (
    DeadlineExceeded,
    InternalError,
    ModelLoading,
    ProjectNotFound,
    ResourceExhausted,
    ShuttingDown,
    Unavailable,
)
from services.core.models.prompts import Prompt, PromptFormat
from services.core.models.spelling import Overhang
from services.core.quota.quotas import owners
from services.core.quota.rates import Rates
from services.core.telemetry import tracing
from services.inference import completion_id, figures
from services.inference.adapters.follower import Follower
from services.inference.adapters.loader import Loader
from services.inference.adapters.registry import Pin, Registry
from services.inference.adapters.route import Version
from services.inference.adapters.swapper import wanted
from services.inference.engine import sequence as engine
from services.inference.engine.text import TextStream, suffix_stop
from services.inference.inbox import Inbox, Post
from services.inference.policy import Projects
from services.inference.prompter import Code, Prompter, Turn

if TYPE_CHECKING:
    from services.inference.model import LoadedModel

_log = log.get("inference.completions")
_RETRY_LOADING = 2.0
_POLICY_WAIT = 5.0
"""Seconds that a project's first completion waits for its policy, and for the adapter that it names: where no policy
can be read by then the base model answers."""
_PLACE_WAIT = 5.0
"""Seconds that a completion waits for a place in device memory, for a version that has none."""


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
    n: int = 1
    """Completions of the same prompt; of a seed, each next one draws with the next seed."""
    base: bool = False
    """The base model answers, whatever the policy says."""
    checkpoint: str = ""
    """This checkpoint answers, whatever the policy says."""
    session: str = ""
    """Of an editor: a newer request takes the older one's place, and a split sends all of them to one side."""
    id: str = field(default_factory=completion_id.draw)
    """Of the completion, without the version that will answer."""
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
class Logprob:
    """A token and the natural logarithm of its probability."""

    text: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()
    """The likeliest tokens at its place, and theirs."""


@dataclass(frozen=True, slots=True)
class Delta:
    """Some more text of one of the completions."""

    index: int
    text: str
    tokens: int
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last part of one of the completions."""

    index: int
    reason: engine.Reason
    prompt_tokens: int
    completion_tokens: int
    queue_seconds: float
    first_token_seconds: float
    total_seconds: float


class Completions:
    """Answers requests with whatever model and adapters this replica holds. All methods belong to one event loop.

    Args:
        model: becomes the loaded model.
        load_wait: seconds that a request waits for it.
        tokens: of what projects and keys may use.
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
        tokens: Rates,
    ) -> None:
        self.tokens = tokens
        self._model, self._registry, self._follower, self._loader = model, registry, follower, loader
        self._projects, self.prompter, self._load_wait = projects, prompter, load_wait
        self.post = Post()
        self.generations: Counter[str] = Counter()
        """By project, how often one of that name was deleted while this process ran: of the one before, a new one finds
        no keys and values."""

    def forget(self, project: str) -> None:
        """A project was deleted."""
        self.generations[project] += 1

    @property
    def loaded(self) -> LoadedModel | None:
        """The model, once it is loaded."""
        done = self._model.done() and not self._model.cancelled() and self._model.exception() is None
        return self._model.result() if done else None

    async def run(self, request: Request) -> AsyncGenerator[Started | Delta | Finished, None]:
        """The parts of one answer. Closing the iterator ends the generation within a step.

        Raises:
            ProjectNotFound, CheckpointNotFound, ModelLoading, QueueFull, PromptTooLong, ChatUnsupported, ShuttingDown,
            AdapterRejected, BaseModelMismatch, DigestMismatch, StoreUnavailable, QuotaExceeded, ResourceExhausted:
            before the first part.
            DeadlineExceeded: the deadline passed before the first step.
        """
        model, pin = await self.hold(request)
        inbox, charge = Inbox(request.n, pin, self.post), None
        try:
            # The version that answers says how it wants its prompts.
            fmt = (pin.version.format if pin.version else None) or model.format
            prompt = await self._prompt(model, fmt, request)
            sequences = self._sequences(model, fmt, request, prompt, inbox)
            most = len(prompt.ids) + request.n * request.stop.max_tokens
            charge = self.tokens.take(owners(current(), request.project), most)
            model.engine.submit(*sequences)
        except BaseException:
            pin.release()
            if charge is not None:
                charge.settle(0)
            raise
        version, started = pin.version, False
        try:
            while inbox.awaited:
                index, output = await inbox.get()
                sequence = sequences[index]
                raise_if_broken(output.reason, is_waiting=sequence.start_time is None and not started)
                if not started:  # also for one that was superseded in the queue
                    started = True
                    yield Started(
                        completion_id=completion_id.complete(request.id, version.sha256 if version else ""),
                        model=model.base.model,
                        adapter_sha256=version.sha256 if version else "",
                        checkpoint=version.checkpoint if version else "",
                        prompt=prompt,
                        cached_tokens=sequence.cached or 0,
                    )
                if output.text:
                    yield Delta(index, output.text, output.tokens, _logprobs(model, output.logprobs))
                if output.reason is not None:
                    figures.finished(sequence, output.reason)
                    self._trace_first(request.project, version)
                    yield _finished(index, sequence, output.reason)
        finally:
            for index in inbox.awaited:
                model.engine.cancel(sequences[index])
            charge.settle(taken(sequences))

    def _trace_first(self, project: str, version: Version | None) -> None:
        """The end of the trace that led to a version: the first completion on it, whoever asked for that."""
        standing = self._follower.standing(project)
        if not standing.swap_trace or version is None or version != self._registry.route(project).main:
            return
        parent, standing.swap_trace = standing.swap_trace, ""
        links, about = [tracing.traceparent()], {"codegraft.checkpoint": version.checkpoint}
        tracing.took("first completion", 0.0, parent=parent, links=links, attributes=about)

    async def hold(self, request: Request) -> tuple[LoadedModel, Pin]:
        """The model, and the version that answers; the caller releases it.

        Raises:
            QueueFull: it would be refused, before any work on it.
            ProjectNotFound, CheckpointNotFound, ModelLoading, AdapterRejected, BaseModelMismatch, DigestMismatch,
            StoreUnavailable, ResourceExhausted.
        """
        if not await self._projects.exists(request.project):
            raise ProjectNotFound(
                f"no project {request.project}", field="parent", hint="Create the project first.", name=request.project
            )
        model = self.loaded or await self._wait_for_model(request.deadline)
        model.engine.check(request.project, _session(request), request.n, request.deadline)
        return model, await self._pin(model, request)

    async def _wait_for_model(self, deadline: float | None) -> LoadedModel:
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
            return await self.prompter.completion(model, fmt, request.prompt, request.stop.max_tokens)
        return await self.prompter.chat(model, request.prompt, request.stop.max_tokens)

    async def _pin(self, model: LoadedModel, request: Request) -> Pin:
        """The version that answers; staged first when it gave its place to others."""
        if request.base:
            return self._registry.pin_base(request.project)
        if request.checkpoint:
            while True:
                loaded = await self._loader.load(request.checkpoint, model, patience=_patience(request))
                if pin := self._registry.pin_version(request.project, loaded.version):
                    return pin
        standing = self._follower.standing(request.project)
        try:
            async with asyncio.timeout(_POLICY_WAIT):
                await self._follower.ensure(request.project, confirmed=self._projects.confirmed(request.project))
        except (Unavailable, TimeoutError) as error:  # without NATS completions go on
            if isinstance(error, TimeoutError) and not standing.tried and standing.serving and wanted(standing.serving):
                raise ModelLoading(
                    f"the adapter of {request.project} is still being loaded",
                    hint="Try again in a moment.",
                    retry_after=_RETRY_LOADING,
                ) from None
            _log.warning("the policy cannot be read, serving what is there", project=request.project, error=str(error))
        if standing.homeless:
            raise ResourceExhausted(
                f"no place is free for the adapter of {request.project}",
                hint="Try again, or set CODEGRAFT_INFERENCE_DEVICE_ADAPTERS higher.",
                retry_after=1.0,
            )
        key = request.session or request.id
        while (pin := self._registry.pin(request.project, key)) is None:
            if version := self._registry.route(request.project).choose(request.project, key):
                await self._loader.load(version.checkpoint, model, sha256=version.sha256, patience=_patience(request))
        return pin

    def _sequences(
        self, model: LoadedModel, fmt: PromptFormat, request: Request, prompt: Prompt, inbox: Inbox
    ) -> list[engine.Sequence]:
        # An adapter that was taught sentinels in a short run does not end where the suffix begins: of expressions in
        # a line 35 % are exact with this stop, none without (bench/fim.py).
        ends_at_suffix = not prompt.suffix_used or bool(fmt.sentinels)
        suffix = request.prompt.suffix if isinstance(request.prompt, Code) and ends_at_suffix else ""
        seed = request.sampling.seed
        session = _session(request)
        sequences: list[engine.Sequence] = []
        for index in range(request.n):
            sequence = engine.Sequence(
                prompt=prompt.ids,
                max_tokens=request.stop.max_tokens,
                text=TextStream(
                    model.vocabulary,
                    stop=request.stop.strings,
                    suffix_stop=suffix_stop(suffix),
                    single_line=request.stop.single_line,
                    overhang=Overhang.of(prompt.overhang, prompt.overhang_ids, model.vocabulary),
                ),
                deliver=inbox.door(index),
                sampling=replace(request.sampling, seed=None if seed is None else seed + index),
                adapter=inbox.pin.weights,
                stop_ids=frozenset(fmt.stop_ids),
                deadline=request.deadline,
                project=request.project,
                generation=self.generations[request.project],
                session=session,
                after=sequences[0] if sequences else None,
            )
            sequences.append(sequence)
        return sequences


def _session(request: Request) -> str:
    """Of the caller: what one key calls its session drops nothing of another's."""
    return f"{request.project}/{current().subject}/{request.session}" if request.session else ""


def _patience(request: Request) -> float:
    """Seconds that it may wait for a place for its version from now on; below 0 when its time is over."""
    return _PLACE_WAIT if request.deadline is None else min(_PLACE_WAIT, request.deadline - time.monotonic())


def taken(sequences: Sequence[engine.Sequence]) -> int:
    """Tokens that the sequences of one prompt took: the prompt's once, and theirs; none where none got a place."""
    if all(sequence.start_time is None for sequence in sequences):
        return 0
    return len(sequences[0].prompt) + sum(sequence.generated for sequence in sequences)


def raise_if_broken(reason: engine.Reason | None, *, is_waiting: bool) -> None:
    """Raises the error that an end stands for, if it is one.

    Args:
        is_waiting: whether nothing has been computed yet.
    """
    if reason is engine.Reason.FAILED:
        raise InternalError("the engine failed on this completion")
    if reason is engine.Reason.CANCELLED:
        raise ShuttingDown("this replica is shutting down", retry_after=0.5)
    if reason is engine.Reason.DEADLINE and is_waiting:
        raise DeadlineExceeded("the deadline passed in the queue", hint="Give more time, or run more replicas.")


def _logprobs(model: LoadedModel, logprobs: tuple[engine.TokenLogprob, ...]) -> tuple[Logprob, ...]:
    text = model.vocabulary
    return tuple(
        Logprob(text[item.token], item.logprob, tuple((text[token], logprob) for token, logprob in item.top))
        for item in logprobs
    )


def _finished(index: int, sequence: engine.Sequence, reason: engine.Reason) -> Finished:
    now = time.monotonic()
    started = sequence.start_time if sequence.start_time is not None else now
    first = sequence.first_token_time
    return Finished(
        index=index,
        reason=reason,
        prompt_tokens=len(sequence.prompt),
        completion_tokens=sequence.generated,
        queue_seconds=started - sequence.submit_time,
        first_token_seconds=(first - started) if first is not None else 0.0,
        total_seconds=now - sequence.submit_time,
    )
