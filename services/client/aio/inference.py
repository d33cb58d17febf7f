"""Completions, chat, and the policy that chooses the adapter."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import grpc

from codegraft.common.v1 import model_pb2
from codegraft.inference.v1 import completion_pb2, completion_pb2_grpc, serving_pb2, serving_pb2_grpc
from services.client.aio.caller import Caller
from services.client.aio.ingest import project_name
from services.client.pieces import Piece
from services.client.streams import AsyncStream


class Completions:
    """Streamed completions."""

    def __init__(self, channel: grpc.aio.Channel, caller: Caller) -> None:
        self._stub = completion_pb2_grpc.CompletionServiceStub(channel)
        self._caller = caller

    def complete(
        self,
        project: str,
        *,
        prefix: str = "",
        suffix: str = "",
        path: str = "",
        language: str = "",
        context: Sequence[completion_pb2.ContextChunk] = (),
        max_tokens: int | None = None,
        single_line: bool = False,
        stop: Sequence[str] = (),
        sampling: completion_pb2.Sampling | None = None,
        adapter: completion_pb2.AdapterChoice | None = None,
        session: str = "",
        timeout: float | None = None,
    ) -> AsyncStream[Piece]:
        """Completes the code between prefix and suffix. Dropping or cancelling the stream stops the generation.

        Args:
            path: path of the file, which tells its language.
            language: of a file without a path, by linguist's name.
            context: code of other files that helps.
            max_tokens: new tokens at most.
            single_line: stop at the end of the first non-empty line.
            stop: stop before any of these strings.
            sampling: how tokens are chosen; greedy when None.
            adapter: which version answers; the project's policy when None.
            session: editor session: a newer request of it drops this one.
            timeout: seconds; when they pass, the text so far is valid and the last piece says so.

        Raises:
            EmptyPrompt, PromptTooLong, ProjectNotFound, QueueFull, ModelLoading.
        """
        request = completion_pb2.CompleteRequest(
            parent=project_name(project),
            prompt=completion_pb2.CodePrompt(
                path=path, prefix=prefix, suffix=suffix, context=context, language=language
            ),
            sampling=sampling,
            stop=completion_pb2.StopRule(max_tokens=max_tokens, strings=stop, single_line=single_line),
            adapter=adapter,
            session=session,
        )
        return self._caller.stream(self._stub.Complete, request, Piece.of, timeout)

    def chat(
        self,
        project: str,
        messages: Sequence[completion_pb2.ChatMessage],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        sampling: completion_pb2.Sampling | None = None,
        adapter: completion_pb2.AdapterChoice | None = None,
        timeout: float | None = None,
    ) -> AsyncStream[Piece]:
        """Answers a conversation; see :meth:`complete`. Raises ChatUnsupported besides."""
        request = completion_pb2.ChatRequest(
            parent=project_name(project),
            messages=messages,
            sampling=sampling,
            stop=completion_pb2.StopRule(max_tokens=max_tokens, strings=stop),
            adapter=adapter,
        )
        return self._caller.stream(self._stub.Chat, request, Piece.of, timeout)

    async def score(
        self,
        project: str,
        continuation: str,
        *,
        prefix: str = "",
        suffix: str = "",
        path: str = "",
        adapter: completion_pb2.AdapterChoice | None = None,
    ) -> completion_pb2.ScoreResponse:
        """The log-probability of every token of a given continuation.

        Raises:
            EmptyPrompt, PromptTooLong, ProjectNotFound, QueueFull, ModelLoading.
        """
        request = completion_pb2.ScoreRequest(
            parent=project_name(project),
            prompt=completion_pb2.CodePrompt(path=path, prefix=prefix, suffix=suffix),
            continuation=continuation,
            adapter=adapter,
        )
        return await self._caller.unary(self._stub.Score, request, repeat=True)

    async def models(self, page_size: int = 0) -> AsyncIterator[model_pb2.Model]:
        """The base model that is served."""
        request = completion_pb2.ListModelsRequest(page_size=page_size)
        async for page in self._caller.pages(self._stub.ListModels, request):
            for model in page.models:
                yield model


class Serving:
    """Which adapter answers for a project."""

    def __init__(self, channel: grpc.aio.Channel, caller: Caller) -> None:
        self._stub = serving_pb2_grpc.ServingServiceStub(channel)
        self._caller = caller

    async def set(
        self,
        project: str,
        mode: serving_pb2.ServingMode,
        *,
        checkpoint: str = "",
        split: serving_pb2.Split | None = None,
        etag: str = "",
    ) -> serving_pb2.Serving:
        """Sets the policy as a whole; replicas converge to it within seconds, see :meth:`watch`.

        With an etag it is tried once: after a lost answer, a second try would meet the first one's etag.

        Args:
            checkpoint: for PINNED, the full name of the checkpoint.
            split: another version that answers a part of the requests; None ends a split.

        Raises:
            ProjectNotFound, CheckpointNotFound, BaseModelMismatch, EtagMismatch.
        """
        request = serving_pb2.SetServingRequest(
            parent=project_name(project), mode=mode, checkpoint=checkpoint, split=split, etag=etag
        )
        return (await self._caller.unary(self._stub.SetServing, request, repeat=not etag)).serving

    async def approve(self, project: str, checkpoint: str, *, etag: str = "") -> serving_pb2.Serving:
        """Lets the best checkpoint serve that waits for a person's word (``Serving.waiting_checkpoint``).

        Raises:
            FailedPrecondition: it does not wait.
            AdapterRejected, CheckpointNotFound, EtagMismatch.
        """
        request = serving_pb2.ApproveServingRequest(parent=project_name(project), checkpoint=checkpoint, etag=etag)
        return (await self._caller.unary(self._stub.ApproveServing, request, repeat=not etag)).serving

    async def get(self, project: str) -> serving_pb2.GetServingResponse:
        """The policy, and what the replica that answers serves."""
        request = serving_pb2.GetServingRequest(parent=project_name(project))
        return await self._caller.unary(self._stub.GetServing, request, repeat=True)

    async def watch(self, project: str) -> AsyncIterator[serving_pb2.WatchServingResponse]:
        """Policy and replica as they are now, then after every change and every swap."""
        request = serving_pb2.WatchServingRequest(parent=project_name(project))
        async for message in self._caller.follow(self._stub.WatchServing, request):
            yield message

    async def adapters(self, page_size: int = 0) -> AsyncIterator[serving_pb2.Adapter]:
        """The adapters that the replica holds."""
        request = serving_pb2.ListAdaptersRequest(page_size=page_size)
        async for page in self._caller.pages(self._stub.ListAdapters, request):
            for adapter in page.adapters:
                yield adapter

    async def load(self, checkpoint: str) -> serving_pb2.Adapter:
        """Stages an adapter without serving it. Raises AdapterRejected, BaseModelMismatch, CheckpointNotFound."""
        request = serving_pb2.LoadAdapterRequest(checkpoint=checkpoint)
        return (await self._caller.unary(self._stub.LoadAdapter, request, repeat=True)).adapter

    async def unload(self, checkpoint: str) -> None:
        """Drops a staged adapter once its last stream has ended."""
        request = serving_pb2.UnloadAdapterRequest(checkpoint=checkpoint)
        await self._caller.unary(self._stub.UnloadAdapter, request, repeat=False)
