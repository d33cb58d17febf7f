"""The gRPC face of inference: proto in, domain call, proto out."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Literal

import grpc

from codegraft.common.v1.model_pb2 import Model
from codegraft.inference.v1 import completion_pb2 as pb
from codegraft.inference.v1 import completion_pb2_grpc, serving_pb2, serving_pb2_grpc
from services.core import names
from services.core.errors import EmptyPrompt, InvalidArgument, InvalidPageSize, InvalidPageToken
from services.core.models.catalogue import ModelSpec
from services.inference import completions, scoring
from services.inference.completions import Completions, Delta, Finished, Logprob, Request, Started, Stop
from services.inference.engine.sequence import Sampling
from services.inference.prompter import Code, Turn
from services.inference.serving import ServingDesk

_MARGIN = 0.1
"""Seconds before the caller's deadline at which the text so far is sent, at most a tenth of the time."""
_ROLES = {pb.CHAT_ROLE_SYSTEM: "system", pb.CHAT_ROLE_USER: "user", pb.CHAT_ROLE_ASSISTANT: "assistant"}
Context = grpc.aio.ServicerContext[Any, Any]


class CompletionServicer(completion_pb2_grpc.CompletionServiceServicer):
    """CompletionService."""

    def __init__(self, domain: Completions, spec: ModelSpec) -> None:
        self._domain, self._spec = domain, spec

    async def Complete(self, request: pb.CompleteRequest, context: Context) -> AsyncIterator[pb.CompleteResponse]:
        wanted = _request(request, _code(request.prompt), context, session=request.session)
        async with aclosing(self._domain.run(wanted)) as parts:
            async for part in parts:
                yield pb.CompleteResponse(**_part(part))

    async def Chat(self, request: pb.ChatRequest, context: Context) -> AsyncIterator[pb.ChatResponse]:
        if not any(message.content.strip() for message in request.messages):
            raise EmptyPrompt("messages are empty", field="messages", hint="Send at least one message.")
        if unknown := [message.role for message in request.messages if message.role not in _ROLES]:
            raise InvalidArgument(f"role {unknown[0]} is unknown", field="messages.role", hint="Set every role.")
        if request.messages[-1].role != pb.CHAT_ROLE_USER:
            raise InvalidArgument("the last message is not the user's", field="messages", hint="End with the user.")
        turns = [Turn(_ROLES[message.role], message.content) for message in request.messages]
        async with aclosing(self._domain.run(_request(request, turns, context))) as parts:
            async for part in parts:
                yield pb.ChatResponse(**_part(part))

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        code = _code(request.prompt)
        if not request.continuation:
            raise InvalidArgument("continuation is empty", field="continuation", hint="Send the text to score.")
        scored = await scoring.score(self._domain, _request(request, code, context), code, request.continuation)
        tokens = [pb.ScoredToken(text=item.text, logprob=item.logprob) for item in scored.tokens]
        return pb.ScoreResponse(tokens=tokens, model=scored.model, adapter_sha256=scored.adapter_sha256)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        if request.page_size < 0:
            raise InvalidPageSize("page_size is negative", field="page_size", hint="Use 0 or a positive number.")
        if request.page_token:
            raise InvalidPageToken("page_token is unknown", field="page_token", hint="There is one page only.")
        loaded, spec = self._domain.loaded, self._spec
        model = Model(
            id=spec.id,
            title=spec.title,
            functions=sorted(f"MODEL_FUNCTION_{function}" for function in spec.functions),
            parameters=spec.parameters,
            context_length=loaded.context_length if loaded else spec.context_length,
            fim_style=loaded.format.style if loaded else "",
            lora_targets=spec.lora_targets,
            cached=loaded is not None,
        )
        return pb.ListModelsResponse(models=[model])


class ServingServicer(serving_pb2_grpc.ServingServiceServicer):
    """ServingService."""

    def __init__(self, desk: ServingDesk) -> None:
        self._desk = desk

    async def SetServing(
        self, request: serving_pb2.SetServingRequest, context: Context
    ) -> serving_pb2.SetServingResponse:
        split = request.split if request.HasField("split") else None
        serving = await self._desk.set(request.parent, request.mode, request.checkpoint, split, request.etag)
        return serving_pb2.SetServingResponse(serving=serving)

    async def ApproveServing(
        self, request: serving_pb2.ApproveServingRequest, context: Context
    ) -> serving_pb2.ApproveServingResponse:
        serving = await self._desk.approve(request.parent, request.checkpoint, request.etag)
        return serving_pb2.ApproveServingResponse(serving=serving)

    async def GetServing(
        self, request: serving_pb2.GetServingRequest, context: Context
    ) -> serving_pb2.GetServingResponse:
        serving, status = await self._desk.get(request.parent)
        return serving_pb2.GetServingResponse(serving=serving, status=status)

    async def WatchServing(
        self, request: serving_pb2.WatchServingRequest, context: Context
    ) -> AsyncIterator[serving_pb2.WatchServingResponse]:
        async with aclosing(self._desk.watch(request.parent)) as states:
            async for serving, status in states:
                yield serving_pb2.WatchServingResponse(serving=serving, status=status)

    async def ListAdapters(
        self, request: serving_pb2.ListAdaptersRequest, context: Context
    ) -> serving_pb2.ListAdaptersResponse:
        adapters, token = self._desk.adapters(request.page_size, request.page_token)
        return serving_pb2.ListAdaptersResponse(adapters=adapters, next_page_token=token)

    async def LoadAdapter(
        self, request: serving_pb2.LoadAdapterRequest, context: Context
    ) -> serving_pb2.LoadAdapterResponse:
        return serving_pb2.LoadAdapterResponse(adapter=await self._desk.load(request.checkpoint))

    async def UnloadAdapter(
        self, request: serving_pb2.UnloadAdapterRequest, context: Context
    ) -> serving_pb2.UnloadAdapterResponse:
        self._desk.unload(request.checkpoint)
        return serving_pb2.UnloadAdapterResponse()


def _code(prompt: pb.CodePrompt) -> Code:
    if not prompt.prefix and not prompt.suffix:
        raise EmptyPrompt("prompt has neither prefix nor suffix", field="prompt", hint="Send the code at the cursor.")
    context = tuple((chunk.path, chunk.text) for chunk in prompt.context)
    return Code(prompt.path, prompt.prefix, prompt.suffix, context, prompt.language)


def _request(
    request: pb.CompleteRequest | pb.ChatRequest | pb.ScoreRequest,
    prompt: Code | list[Turn],
    context: Context,
    session: str = "",
) -> Request:
    names.parse(names.PROJECT, request.parent, field="parent")
    checkpoint = request.adapter.checkpoint
    if checkpoint:
        names.parse(names.CHECKPOINT, checkpoint, field="adapter.checkpoint")
        if names.project_of(checkpoint) != request.parent:
            raise InvalidArgument(
                f"{checkpoint} is of another project",
                field="adapter.checkpoint",
                hint=f"Name a checkpoint of {request.parent}.",
            )
    remaining = context.time_remaining()
    asked: dict[str, Any] = {}
    if not isinstance(request, pb.ScoreRequest):
        asked = {"sampling": _sampling(request.sampling), "stop": _stop(request.stop)}
        asked["n"] = _whole(request.sampling, "n", 1, 8) or 1
    return Request(
        project=request.parent,
        prompt=prompt,
        base=request.adapter.base,
        checkpoint=checkpoint,
        session=session,
        deadline=None if remaining is None else time.monotonic() + remaining - min(_MARGIN, remaining / 10),
        **asked,
    )


def _sampling(sampling: pb.Sampling) -> Sampling:
    ranges = {
        "temperature": (0.0, 0.0, 2.0),
        "top_p": (1.0, 1e-6, 1.0),
        "min_p": (0.0, 0.0, 1.0),
        "repetition_penalty": (1.0, 0.5, 2.0),
    }
    values: dict[str, Any] = {}
    for name, (default, low, high) in ranges.items():
        value = getattr(sampling, name) if sampling.HasField(name) else default
        if not low <= value <= high:  # also catches NaN
            raise InvalidArgument(f"{name} is {value}", field=f"sampling.{name}", hint=f"Use {low:g} to {high:g}.")
        values[name] = value
    if sampling.top_k < 0:
        raise InvalidArgument(f"top_k is {sampling.top_k}", field="sampling.top_k", hint="Use 0 or a positive number.")
    return Sampling(
        top_k=sampling.top_k,
        seed=sampling.seed if sampling.HasField("seed") else None,
        logprobs=_whole(sampling, "logprobs", 0, 20),
        **values,
    )


def _whole(sampling: pb.Sampling, name: Literal["n", "logprobs"], low: int, high: int) -> int | None:
    """A field's value; None when it is absent."""
    if not sampling.HasField(name):
        return None
    value: int = getattr(sampling, name)
    if not low <= value <= high:
        raise InvalidArgument(f"{name} is {value}", field=f"sampling.{name}", hint=f"Use {low} to {high}.")
    return value


def _stop(stop: pb.StopRule) -> Stop:
    max_tokens = stop.max_tokens if stop.HasField("max_tokens") else Stop().max_tokens
    if not 1 <= max_tokens <= 4096:
        raise InvalidArgument(f"max_tokens is {max_tokens}", field="stop.max_tokens", hint="Use 1 to 4096.")
    if len(stop.strings) > 16 or any(not 0 < len(string) <= 256 for string in stop.strings):
        raise InvalidArgument(
            "stop.strings are too many, too long or empty",
            field="stop.strings",
            hint="Use at most 16 strings of 1 to 256 characters.",
        )
    return Stop(max_tokens, tuple(stop.strings), stop.single_line)


def _part(part: Started | Delta | Finished) -> dict[str, Any]:
    match part:
        case completions.Started():
            started = pb.Started(
                completion_id=part.completion_id,
                model=part.model,
                adapter_sha256=part.adapter_sha256,
                checkpoint=part.checkpoint,
                prompt_tokens=len(part.prompt.ids),
                cached_tokens=part.cached_tokens,
                suffix_in_prompt=part.prompt.suffix_used,
                prompt_truncated=part.prompt.truncated,
            )
            return {"started": started}
        case completions.Delta():
            logprobs = [_logprob(item) for item in part.logprobs]
            return {"delta": pb.Delta(text=part.text, tokens=part.tokens, index=part.index, logprobs=logprobs)}
        case completions.Finished():
            finished = pb.Finished(
                index=part.index,
                reason=f"FINISH_REASON_{part.reason}",
                usage=pb.Usage(prompt_tokens=part.prompt_tokens, completion_tokens=part.completion_tokens),
                timings=pb.Timings(
                    queue_seconds=part.queue_seconds,
                    first_token_seconds=part.first_token_seconds,
                    total_seconds=part.total_seconds,
                ),
            )
            return {"finished": finished}


def _logprob(item: Logprob) -> pb.TokenLogprob:
    top = [pb.TopLogprob(text=text, logprob=logprob) for text, logprob in item.top]
    return pb.TokenLogprob(text=item.text, logprob=item.logprob, top=top)
