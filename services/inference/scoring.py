"""How likely a given continuation is, token by token."""

from __future__ import annotations

from dataclasses import dataclass

from services.core.auth.caller import current
from services.core.errors import DeadlineExceeded
from services.core.quota.quotas import owners
from services.inference.completions import Completions, Logprob, Request, raise_if_broken
from services.inference.engine import sequence as engine
from services.inference.engine.text import TextStream
from services.inference.inbox import Inbox
from services.inference.prompter import Code


@dataclass(frozen=True, slots=True)
class Scored:
    """A continuation under one model."""

    tokens: list[Logprob]
    """Their texts together are the continuation."""
    model: str
    adapter_sha256: str
    """Empty for the base model."""


async def score(completions: Completions, request: Request, code: Code, continuation: str) -> Scored:
    """The log-probability of each token of a continuation, as if it were generated after the prompt of a completion.

    One pass of the engine, in steps with everybody's. Prompt and continuation are cut into tokens as one document is;
    of a token across their border, which is scored as a whole, the text is what lies behind it.

    Raises:
        PromptTooLong: prompt and continuation do not fit the model's context.
        DeadlineExceeded: the deadline passed.
        ProjectNotFound, CheckpointNotFound, ModelLoading, QueueFull, QuotaExceeded, ShuttingDown, AdapterRejected,
            BaseModelMismatch, DigestMismatch, StoreUnavailable, ResourceExhausted: as a completion.
    """
    model, pin = await completions.hold(request)
    inbox, charge = Inbox(1, pin, completions.post), None
    try:
        fmt = (pin.version.format if pin.version else None) or model.format
        prompt, ids = await completions.prompter.scored(model, fmt, code, continuation)
        before, known = 0, len(prompt.overhang.encode())
        while known and before < len(ids) - 1 and len(model.vocabulary[ids[before]]) <= known:
            known -= len(model.vocabulary[ids[before]])
            before += 1
        sequence = engine.Sequence(
            prompt=[*prompt.ids, *ids[:-1]],
            max_tokens=0,
            text=TextStream(model.vocabulary),
            deliver=inbox.door(0),
            adapter=pin.weights,
            deadline=request.deadline,
            project=request.project,
            generation=completions.generations[request.project],
            targets=tuple(ids[before:]),
        )
        most = len(prompt.ids) + len(ids)
        charge = completions.tokens.take(owners(current(), request.project), most)
        model.engine.submit(sequence)
    except BaseException:
        pin.release()
        if charge is not None:
            charge.settle(0)
        raise
    try:
        output = engine.Output()
        while output.reason is None:
            _, output = await inbox.get()
    finally:
        if inbox.awaited:
            model.engine.cancel(sequence)
        charge.settle(most if sequence.start_time is not None else 0)
    raise_if_broken(output.reason, is_waiting=sequence.start_time is None)
    if output.reason is engine.Reason.DEADLINE:
        raise DeadlineExceeded("the deadline passed before the end was scored", hint="Give more time.")
    texts = [model.vocabulary[item.token] for item in output.logprobs]
    texts[0] = texts[0][known:]
    tokens = [Logprob(text, item.logprob) for text, item in zip(texts, output.logprobs, strict=True)]
    return Scored(tokens, model.base.model, pin.version.sha256 if pin.version else "")
