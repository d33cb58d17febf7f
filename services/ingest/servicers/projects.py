"""ProjectService."""

from __future__ import annotations

import contextlib
from typing import Any

import grpc

from codegraft.event.v1.events_pb2 import ProjectChanged
from codegraft.ingest.v1 import project_pb2 as pb
from codegraft.ingest.v1.project_pb2_grpc import ProjectServiceServicer
from services.core import names
from services.core.auth.caller import Role, current
from services.core.errors import (
    InvalidArgument,
    PermissionDenied,
    ProjectNotEmpty,
    ResourceExists,
    Unavailable,
)
from services.core.events import EventBus
from services.core.masks import Masks
from services.ingest.deletions import Deletions
from services.ingest.records import Tables, same_request

Context = grpc.aio.ServicerContext[Any, Any]
CHANGED = "codegraft.ingest.project.changed.v1"


class ProjectServicer(ProjectServiceServicer):
    """See the proto for what every call does and which errors it has."""

    def __init__(self, tables: Tables, events: EventBus, deletions: Deletions) -> None:
        self._tables, self._events, self._deletions = tables, events, deletions

    async def CreateProject(self, request: pb.CreateProjectRequest, context: Context) -> pb.CreateProjectResponse:
        names.check_id(request.project_id, "project_id")
        _check(request.project)
        wanted = pb.Project(
            name=names.build(names.PROJECT, project=request.project_id),
            title=request.project.title,
            exclude=request.project.exclude,
            include=request.project.include,
            languages_off=request.project.languages_off,
            exclude_licenses=request.project.exclude_licenses,
            keep_completions=request.project.keep_completions,
            request_id=request.request_id,
        )
        wanted.create_time.GetCurrentTime()
        wanted.update_time.CopyFrom(wanted.create_time)
        if wanted.keep_completions:
            wanted.keep_completions_time.CopyFrom(wanted.create_time)
        try:
            await self._deletions.begins(wanted)
            made = await self._tables.projects.create(wanted)
            await self._tell(made)
            return pb.CreateProjectResponse(project=made)
        except ResourceExists:
            there = await self._tables.projects.get(wanted.name)
            same_request(there, _choices(there) == _choices(wanted), request.request_id)
            return pb.CreateProjectResponse(project=there)

    async def GetProject(self, request: pb.GetProjectRequest, context: Context) -> pb.GetProjectResponse:
        return pb.GetProjectResponse(project=await self._tables.known(request.name, "name"))

    async def ListProjects(self, request: pb.ListProjectsRequest, context: Context) -> pb.ListProjectsResponse:
        caller = current()
        found, token = await self._tables.projects.page(
            "", request.page_size, request.page_token, where=lambda each: caller.covers(frozenset({each.name}))
        )
        return pb.ListProjectsResponse(projects=found, next_page_token=token)

    async def UpdateProject(self, request: pb.UpdateProjectRequest, context: Context) -> pb.UpdateProjectResponse:
        names.parse(names.PROJECT, request.project.name, field="project.name")
        _check(request.project)

        def change(record: pb.Project) -> None:
            if record.keep_completions != request.project.keep_completions and current().role < Role.OPERATOR:
                raise PermissionDenied(
                    "only an operator decides whether texts of completions are kept",
                    field="project.keep_completions",
                    hint="Send it as it is, or use an operator's key.",
                )
            if request.project.keep_completions and not record.keep_completions:
                record.keep_completions_time.GetCurrentTime()
            elif not request.project.keep_completions:
                record.ClearField("keep_completions_time")
            record.keep_completions = request.project.keep_completions
            record.title = request.project.title
            record.exclude[:] = request.project.exclude
            record.include[:] = request.project.include
            record.languages_off[:] = request.project.languages_off
            record.exclude_licenses[:] = request.project.exclude_licenses
            record.update_time.GetCurrentTime()

        await self._tables.known(request.project.name, "project.name")
        stored = await self._tables.projects.mutate(request.project.name, change, etag=request.project.etag)
        await self._tell(stored)
        return pb.UpdateProjectResponse(project=stored)

    async def DeleteProject(self, request: pb.DeleteProjectRequest, context: Context) -> pb.DeleteProjectResponse:
        project = await self._tables.known(request.name, "name")
        sources = await self._tables.sources.all(request.name + "/")
        if sources and not request.force:
            raise ProjectNotEmpty(
                f"{request.name} has {len(sources)} sources",
                field="force",
                hint="Remove them first, or delete the project with force.",
            )
        # The project goes first: what refers to it is refused from then on, and what is left is out of reach.
        async with self._deletions.deleting(request.name):
            await self._tables.projects.delete(request.name, etag=request.etag)
            await self._tell(project, deleted=True)
        return pb.DeleteProjectResponse()

    async def _tell(self, project: pb.Project, *, deleted: bool = False) -> None:
        id = f"{project.name}@{project.etag}{'/deleted' if deleted else ''}"
        event = ProjectChanged(project=project.name, deleted=deleted)
        with contextlib.suppress(Unavailable):  # the record is the truth
            await self._events.publish(CHANGED, project.name, event, id=id)


def _check(project: pb.Project) -> None:
    """Whether linguist knows a language is the scanner's to say: a scan warns of one that it does not know."""
    Masks(project.exclude, field="project.exclude")
    Masks(project.include, field="project.include")
    for field in ("languages_off", "exclude_licenses"):
        for value in getattr(project, field):
            if not value.strip() or len(value) > 100:
                raise InvalidArgument(
                    f"{value[:100]!r} cannot be in {field}",
                    field=f"project.{field}",
                    hint="Give names such as Python, or SPDX ids such as GPL-*.",
                )


def _choices(project: pb.Project) -> tuple[object, ...]:
    """What the caller chose."""
    lists = project.exclude, project.include, project.languages_off, project.exclude_licenses
    return project.title, project.keep_completions, *map(list, lists)
