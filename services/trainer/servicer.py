"""RunService: requests in, tables and plans, responses out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc

from codegraft.common.v1.job_pb2 import JOB_STATE_QUEUED
from codegraft.scanner.v1.dataset_pb2 import DatasetManifest
from codegraft.trainer.v1 import run_pb2 as pb
from codegraft.trainer.v1.checkpoint_pb2 import AdapterManifest
from codegraft.trainer.v1.hyperparameters_pb2 import Hyperparameters
from codegraft.trainer.v1.run_pb2_grpc import RunServiceServicer
from services.core import names
from services.core.auth.caller import current
from services.core.errors import (
    BaseModelMismatch,
    CheckpointNotFound,
    InvalidArgument,
    InvalidName,
    RequestIdReused,
    ResourceExists,
    RunNotFound,
)
from services.core.jobs import is_final, new_status, request_cancel, request_pause, request_resume
from services.core.models import catalogue
from services.core.models.catalogue import ModelSpec
from services.core.pages import bounds, token
from services.core.quota.places import Places
from services.core.quota.quotas import owners
from services.core.runtime import Runtime
from services.trainer import datasets
from services.trainer.config import TrainerSettings
from services.trainer.corpus import data
from services.trainer.datasets import Newest
from services.trainer.planning import machine
from services.trainer.planning.initial import inherited
from services.trainer.planning.plan import Facts, plan
from services.trainer.planning.settings import check
from services.trainer.records import BEST, Tables

KIND = "run"
"""Of its jobs."""
LATEST = "latest"
_LONGEST_HOLD = timedelta(days=30)

Context = grpc.aio.ServicerContext[Any, Any]


class RunServicer(RunServiceServicer):
    """See the proto for what every call does and which errors it has."""

    def __init__(
        self, runtime: Runtime, settings: TrainerSettings, tables: Tables, newest: Newest, places: Places
    ) -> None:
        self._runtime = runtime
        self._places = places
        self._settings = settings
        self._tables = tables
        self._newest = newest

    async def PlanRun(self, request: pb.PlanRunRequest, context: Context) -> pb.PlanRunResponse:
        spec = self._model(request.base_model, request.hyperparameters)
        manifest = await datasets.find(self._runtime.artifacts, self._newest, request.parent, request.dataset)
        train, _ = await datasets.fetch(self._runtime.artifacts, manifest)
        requested = self._settings.with_defaults(request.hyperparameters)
        base_loss = await asyncio.to_thread(data.base_loss, train)
        _, told = plan(requested, self._facts(spec, manifest, base_loss))
        return pb.PlanRunResponse(plan=told)

    async def CreateRun(self, request: pb.CreateRunRequest, context: Context) -> pb.CreateRunResponse:
        names.parse(names.PROJECT, request.parent, field="parent")
        spec = self._model(await self._base_model(request), request.hyperparameters)
        run_id = names.new_id("r", request_id=request.request_id, scope=request.parent)
        if (there := await self._tables.runs.find(f"{request.parent}/runs/{run_id}")) is not None:
            return pb.CreateRunResponse(run=await self._again(there, request, spec))
        await self._runtime.storage.check(request.parent)
        manifest = await datasets.find(self._runtime.artifacts, self._newest, request.parent, request.dataset)
        run = pb.Run(
            name=f"{request.parent}/runs/{run_id}",
            dataset=manifest.name,
            base_model=spec.id,
            requested=request.hyperparameters,
            status=new_status(),
            title=request.title,
            request_id=request.request_id,
            creator=current().subject,
        )
        async with self._places.claim(owners(current(), request.parent), run.name):
            run.initial_checkpoint = await self._initial(request, spec) if request.initial_checkpoint else ""
            try:
                run = await self._tables.runs.create(run)
            except ResourceExists:
                there = await self._tables.runs.get(run.name)
                return pb.CreateRunResponse(run=await self._again(there, request, spec))
        await self._runtime.jobs.submit(KIND, run.name)
        return pb.CreateRunResponse(run=run)

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.GetRunResponse:
        ids = names.parse(names.RUN, request.name)
        if ids["run"] != LATEST:
            return pb.GetRunResponse(run=await self._placed(await self._tables.runs.get(request.name)))
        newest, _ = await self._tables.runs.page(names.project_of(request.name), 1, "", newest_first=True)
        if not newest:
            raise RunNotFound(f"{names.project_of(request.name)} has no run yet", field="name", hint="Create one.")
        return pb.GetRunResponse(run=await self._placed(newest[0]))

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        names.parse(names.PROJECT, request.parent, field="parent")
        found, next_token = await self._tables.runs.page(
            request.parent, request.page_size, request.page_token, newest_first=True
        )
        return pb.ListRunsResponse(runs=found, next_page_token=next_token)

    async def WatchRun(self, request: pb.WatchRunRequest, context: Context) -> AsyncIterator[pb.WatchRunResponse]:
        names.parse(names.RUN, request.name)
        if request.after_sequence < 0:
            raise InvalidArgument(
                "after_sequence is negative", field="after_sequence", hint="Use 0 for the whole story."
            )
        told = request.after_sequence
        async for run in self._tables.runs.watch(request.name):
            events = await self._tables.story.read(run.name, told, run.last_sequence)
            for event in events:
                yield pb.WatchRunResponse(run=run, event=event)
            told = max(told, run.last_sequence)
            if not events or is_final(run.status):
                yield pb.WatchRunResponse(run=await self._placed(run))
            if is_final(run.status):
                return

    async def WatchRuns(self, request: pb.WatchRunsRequest, context: Context) -> AsyncIterator[pb.WatchRunsResponse]:
        names.parse(names.PROJECT, request.parent, field="parent")
        async for change in self._tables.runs.follow(request.parent + "/"):
            if change.message is None:
                yield pb.WatchRunsResponse(removed=change.name)
            else:
                yield pb.WatchRunsResponse(run=await self._placed(change.message))

    async def CancelRun(self, request: pb.CancelRunRequest, context: Context) -> pb.CancelRunResponse:
        names.parse(names.RUN, request.name)
        run = await self._tables.runs.mutate(request.name, lambda run: request_cancel(run.status))
        return pb.CancelRunResponse(run=run)

    async def PauseRun(self, request: pb.PauseRunRequest, context: Context) -> pb.PauseRunResponse:
        names.parse(names.RUN, request.name)
        run = await self._tables.runs.mutate(request.name, lambda run: request_pause(run.status))
        return pb.PauseRunResponse(run=run)

    async def ResumeRun(self, request: pb.ResumeRunRequest, context: Context) -> pb.ResumeRunResponse:
        names.parse(names.RUN, request.name)
        await self._runtime.storage.check(names.project_of(request.name))
        whose = owners(current(), names.project_of(request.name))
        async with self._places.claim(whose, request.name):
            run = await self._tables.runs.mutate(request.name, lambda run: request_resume(run.status))
        if run.status.state == JOB_STATE_QUEUED:
            await self._runtime.jobs.submit(KIND, run.name)
        return pb.ResumeRunResponse(run=run)

    async def ListCheckpoints(self, request: pb.ListCheckpointsRequest, context: Context) -> pb.ListCheckpointsResponse:
        names.parse(names.RUN, request.parent, field="parent")
        await self._tables.runs.get(request.parent)
        begin, end = bounds(request.page_size, request.page_token, request.parent)
        found = sorted(await self._tables.checkpoints.all(request.parent + "/"), key=lambda checkpoint: checkpoint.step)
        next_token = token(end, request.parent) if end < len(found) else ""
        return pb.ListCheckpointsResponse(checkpoints=found[begin:end], next_page_token=next_token)

    async def GetCheckpoint(self, request: pb.GetCheckpointRequest, context: Context) -> pb.GetCheckpointResponse:
        return pb.GetCheckpointResponse(checkpoint=await self._tables.find_checkpoint(request.name))

    async def KeepCheckpoint(self, request: pb.KeepCheckpointRequest, context: Context) -> pb.KeepCheckpointResponse:
        if not 0 <= request.hold_seconds <= _LONGEST_HOLD.total_seconds():
            raise InvalidArgument(
                f"hold_seconds is {request.hold_seconds}",
                field="hold_seconds",
                hint=f"Use 1 to {_LONGEST_HOLD.total_seconds():.0f}, or set kept for as long as it takes.",
            )
        found = await self._tables.find_checkpoint(request.name)
        if request.hold_seconds:
            until = datetime.now(UTC) + timedelta(seconds=request.hold_seconds)
            return pb.KeepCheckpointResponse(checkpoint=await self._tables.hold(found.name, until))
        return pb.KeepCheckpointResponse(checkpoint=await self._tables.keep(found.name, kept=request.kept))

    async def GetBestCheckpoint(
        self, request: pb.GetBestCheckpointRequest, context: Context
    ) -> pb.GetBestCheckpointResponse:
        names.parse(names.PROJECT, request.parent, field="parent")
        model = request.base_model or self._settings.trainer_model
        runs = [
            run
            for run in await self._tables.runs.all(request.parent + "/")
            if run.best_checkpoint and run.base_model == model
        ]
        if not runs:
            raise CheckpointNotFound(
                f"{request.parent} has no checkpoint on {model} that beats it", field="parent", hint="Train a run."
            )
        latest = max(runs, key=lambda run: (run.status.create_time.ToNanoseconds(), run.name))
        return pb.GetBestCheckpointResponse(checkpoint=await self._tables.checkpoints.get(latest.best_checkpoint))

    async def _again(self, there: pb.Run, request: pb.CreateRunRequest, spec: ModelSpec) -> pb.Run:
        """The run that the same request made before."""
        same = (
            there.requested == request.hyperparameters
            and there.title == request.title
            and request.dataset in ("", there.dataset)
            and (not request.base_model or spec.id == there.base_model)
            and _same_checkpoint(request.initial_checkpoint, there.initial_checkpoint)
        )
        if not same:
            raise RequestIdReused(
                f"request_id {request.request_id!r} came before with another request",
                field="request_id",
                hint="Use a new request_id for a new request.",
            )
        if not is_final(there.status):
            await self._runtime.jobs.submit(KIND, there.name)
        return there

    async def _base_model(self, request: pb.CreateRunRequest) -> str:
        """The one asked for; of a run that starts from a checkpoint, that one's."""
        if request.base_model or not request.initial_checkpoint:
            return request.base_model
        return (await self._tables.find_checkpoint(request.initial_checkpoint, field="initial_checkpoint")).base_model

    async def _initial(self, request: pb.CreateRunRequest, spec: ModelSpec) -> str:
        """The checkpoint that the run starts from, by its full name; kept from now on, for the run will need it."""
        field = "initial_checkpoint"
        found = await self._tables.find_checkpoint(request.initial_checkpoint, field=field)
        if names.project_of(found.name) != request.parent:
            raise InvalidName(f"{found.name} is of another project", field=field, hint="Name one of this project.")
        if found.base_model != spec.id:
            raise BaseModelMismatch(
                f"{found.name} was trained on {found.base_model}, not on {spec.id}",
                field=field,
                hint="Leave base_model out: it comes from the checkpoint.",
            )
        await self._tables.keep(found.name, kept=True)
        inherited(request.hyperparameters, await self._runtime.artifacts.manifest(found.name, AdapterManifest))
        return found.name

    async def _placed(self, run: pb.Run) -> pb.Run:
        """The run; while it waits, its progress tells its place in the queue, which is the same for all projects."""
        if run.status.state == JOB_STATE_QUEUED:
            waiting = [one.status for one in await self._tables.runs.all() if one.status.state == JOB_STATE_QUEUED]
            created = run.status.create_time.ToNanoseconds()
            place = 1 + sum(one.create_time.ToNanoseconds() < created for one in waiting)
            run.status.progress.message = f"waits, {_ordinal(place)} in the queue"
        return run

    def _model(self, base_model: str, requested: Hyperparameters) -> ModelSpec:
        spec = catalogue.find(base_model or self._settings.trainer_model)
        check(requested, spec.context_length)
        return spec

    def _facts(self, spec: ModelSpec, manifest: DatasetManifest, base_loss: float) -> Facts:
        on_gpu = self._settings.trainer_device == "cuda"
        return machine.facts(
            spec,
            train_tokens=manifest.train.tokens,
            train_bytes=manifest.train.bytes,
            test_tokens=manifest.test.tokens,
            base_loss=base_loss,
            has_fim=spec.markers is not None and spec.markers.style != "plain",
            speed=machine.guess_speed(spec, on_gpu=on_gpu),
            on_gpu=on_gpu,
        )


def _same_checkpoint(asked: str, there: str) -> bool:
    """Whether a repeated request may have meant the checkpoint that the run starts from: "best" may have moved on."""
    return asked == there or (asked.endswith(f"/{BEST}") and there.startswith(asked.removesuffix(BEST)))


def _ordinal(number: int) -> str:
    """``1st``, ``12th``."""
    last = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if number % 100 in (11, 12, 13) else last}"
