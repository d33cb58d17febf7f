"""Runs, checkpoints and the model catalogue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc

from codegraft.common.v1 import model_pb2
from codegraft.trainer.v1 import checkpoint_pb2, hyperparameters_pb2, run_pb2, run_pb2_grpc
from codegraft.trainer.v1 import model_pb2 as trainer_model_pb2
from services.client.aio.caller import Caller, new_request_id
from services.client.aio.ingest import project_name
from services.client.content import MODEL_FILES, announced, chunks, measured
from services.client.jobs import raise_failure


class Runs:
    """Jobs that train a LoRA adapter on a dataset."""

    def __init__(self, channel: grpc.aio.Channel, caller: Caller) -> None:
        self._stub = run_pb2_grpc.RunServiceStub(channel)
        self._caller = caller

    async def plan(
        self,
        project: str,
        hyperparameters: hyperparameters_pb2.Hyperparameters | None = None,
        *,
        dataset: str = "",
        base_model: str = "",
    ) -> hyperparameters_pb2.Plan:
        """What a run would do, without training. Raises NoDataset, InvalidHyperparameter, ModelNotFound."""
        request = run_pb2.PlanRunRequest(
            parent=project_name(project), dataset=dataset, base_model=base_model, hyperparameters=hyperparameters
        )
        return (await self._caller.unary(self._stub.PlanRun, request, repeat=True)).plan

    async def create(
        self,
        project: str,
        hyperparameters: hyperparameters_pb2.Hyperparameters | None = None,
        *,
        dataset: str = "",
        base_model: str = "",
        title: str = "",
        initial_checkpoint: str = "",
        request_id: str = "",
    ) -> run_pb2.Run:
        """Queues a run.

        Args:
            hyperparameters: settings; unset ones are chosen from the dataset.
            dataset: full name; empty means the project's newest one.
            base_model: empty means the deployment's default.
            initial_checkpoint: full name of the checkpoint whose weights the adapter starts with; empty starts afresh.
            request_id: idempotency key; a fresh one when empty.

        Raises:
            NoDataset, DatasetNotFound, EmptyDataset, InvalidHyperparameter, ModelNotFound, CheckpointNotFound,
            BaseModelMismatch.
        """
        request = run_pb2.CreateRunRequest(
            parent=project_name(project),
            dataset=dataset,
            base_model=base_model,
            hyperparameters=hyperparameters,
            title=title,
            initial_checkpoint=initial_checkpoint,
            request_id=request_id or new_request_id(),
        )
        return (await self._caller.unary(self._stub.CreateRun, request, repeat=True)).run

    async def get(self, name: str) -> run_pb2.Run:
        """One run by its full name; the id "latest" names the newest. Raises RunNotFound."""
        return (await self._caller.unary(self._stub.GetRun, run_pb2.GetRunRequest(name=name), repeat=True)).run

    async def list(self, project: str, page_size: int = 0) -> AsyncIterator[run_pb2.Run]:
        """Every run of a project, newest first."""
        request = run_pb2.ListRunsRequest(parent=project_name(project), page_size=page_size)
        async for page in self._caller.pages(self._stub.ListRuns, request):
            for run in page.runs:
                yield run

    async def watch(self, name: str, after_sequence: int = 0) -> AsyncIterator[run_pb2.WatchRunResponse]:
        """The run's whole story from after_sequence on, then live; ends after its final state.

        A broken connection is taken up again behind the last event that arrived, so that none comes twice.
        """
        request = run_pb2.WatchRunRequest(name=name, after_sequence=after_sequence)
        async for message in self._caller.follow(self._stub.WatchRun, request):
            if message.HasField("event"):
                request.after_sequence = message.event.sequence
            yield message

    async def watch_all(self, project: str) -> AsyncIterator[run_pb2.WatchRunsResponse]:
        """Every run of a project in no order, then each that is new, changes or is removed, without end."""
        request = run_pb2.WatchRunsRequest(parent=project_name(project))
        async for message in self._caller.follow(self._stub.WatchRuns, request):
            yield message

    async def wait(self, name: str) -> run_pb2.Run:
        """Waits for the end.

        Raises:
            CodegraftError: the run failed or was cancelled; the class that belongs to its reason, with its hint.
        """
        async for _ in self.watch(name):
            pass
        run = await self.get(name)
        raise_failure(run.status, name)
        return run

    async def cancel(self, name: str) -> run_pb2.Run:
        """Asks a run to stop; it keeps its checkpoints."""
        request = run_pb2.CancelRunRequest(name=name)
        return (await self._caller.unary(self._stub.CancelRun, request, repeat=True)).run

    async def pause(self, name: str) -> run_pb2.Run:
        """Stops a run until it is resumed; its device is free meanwhile. Raises InvalidTransition when it has ended."""
        request = run_pb2.PauseRunRequest(name=name)
        return (await self._caller.unary(self._stub.PauseRun, request, repeat=True)).run

    async def resume(self, name: str) -> run_pb2.Run:
        """Queues a paused run; it goes on after its last step. Raises InvalidTransition when it has ended."""
        request = run_pb2.ResumeRunRequest(name=name)
        return (await self._caller.unary(self._stub.ResumeRun, request, repeat=True)).run

    async def checkpoints(self, run: str, page_size: int = 0) -> AsyncIterator[checkpoint_pb2.Checkpoint]:
        """Every checkpoint of a run, by step."""
        request = run_pb2.ListCheckpointsRequest(parent=run, page_size=page_size)
        async for page in self._caller.pages(self._stub.ListCheckpoints, request):
            for checkpoint in page.checkpoints:
                yield checkpoint

    async def checkpoint(self, name: str) -> checkpoint_pb2.Checkpoint:
        """One checkpoint by its full name; the id "best" names the run's best. Raises CheckpointNotFound."""
        request = run_pb2.GetCheckpointRequest(name=name)
        return (await self._caller.unary(self._stub.GetCheckpoint, request, repeat=True)).checkpoint

    async def keep(self, name: str, kept: bool = True) -> checkpoint_pb2.Checkpoint:
        """Keeps a checkpoint though its run has newer ones, or lets it go again. Raises CheckpointNotFound."""
        request = run_pb2.KeepCheckpointRequest(name=name, kept=kept)
        return (await self._caller.unary(self._stub.KeepCheckpoint, request, repeat=True)).checkpoint

    async def best(self, project: str, base_model: str = "") -> checkpoint_pb2.Checkpoint:
        """The best checkpoint of the latest run that has one. Raises CheckpointNotFound."""
        request = run_pb2.GetBestCheckpointRequest(parent=project_name(project), base_model=base_model)
        return (await self._caller.unary(self._stub.GetBestCheckpoint, request, repeat=True)).checkpoint


class Models:
    """Base models that can be fine-tuned."""

    def __init__(self, channel: grpc.aio.Channel, uploads: grpc.Channel, caller: Caller) -> None:
        self._stub = run_pb2_grpc.ModelServiceStub(channel)
        self._uploads = run_pb2_grpc.ModelServiceStub(uploads)
        self._caller = caller

    async def list(self, page_size: int = 0) -> AsyncIterator[model_pb2.Model]:
        """The catalogue, then the models in the object store."""
        request = run_pb2.ListModelsRequest(page_size=page_size)
        async for page in self._caller.pages(self._stub.ListModels, request):
            for model in page.models:
                yield model

    async def get(self, id: str = "") -> model_pb2.Model:
        """One model, also of those that no list names; the trainer's default for an empty id. Raises ModelNotFound."""
        request = trainer_model_pb2.GetModelRequest(id=id)
        return (await self._caller.unary(self._stub.GetModel, request, repeat=True)).model

    async def push(
        self, folder: str | Path, name: str, *, on_progress: Callable[[int], None] = lambda sent: None
    ) -> model_pb2.Model:
        """Puts a model's folder into the object store; its id is then ``store:<name>``.

        Args:
            folder: as transformers saves a model; only configuration, tokenizer and safetensors are sent.
            on_progress: called with the bytes sent so far, from another thread.

        Raises:
            InvalidArgument: a file cannot be read.
            ResourceExists: there is another model of that name.
            ModelNotFound: the folder holds no model.
            InvalidName, LimitExceeded, ResourceExhausted, UploadMismatch.
        """
        contents = await asyncio.to_thread(measured, Path(folder), MODEL_FILES)
        header = trainer_model_pb2.ModelHeader(name=name, files=announced(contents))

        def parts() -> Iterator[trainer_model_pb2.PushModelRequest]:
            yield trainer_model_pb2.PushModelRequest(header=header)
            for chunk in chunks(contents):
                yield trainer_model_pb2.PushModelRequest(chunk=chunk)
                on_progress(chunk.offset + len(chunk.data))

        return (await self._caller.upload(self._uploads.PushModel, parts())).model
