"""SourceService."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import grpc

from codegraft.ingest.v1 import source_pb2 as pb
from codegraft.ingest.v1.source_pb2_grpc import SourceServiceServicer
from services.core import names
from services.core.errors import InvalidArgument, NotSupported, ResourceExists
from services.core.masks import Masks
from services.ingest.config import IngestSettings
from services.ingest.files import plain_path
from services.ingest.records import Tables, same_request
from services.ingest.snapshot import Splits, origin_of
from services.ingest.sources import git, url
from services.ingest.uploads import check_sha256

Context = grpc.aio.ServicerContext[Any, Any]


class SourceServicer(SourceServiceServicer):
    """See the proto for what every call does and which errors it has. The fetcher does the work."""

    def __init__(self, tables: Tables, settings: IngestSettings) -> None:
        self._tables = tables
        self._settings = settings

    async def CreateSource(self, request: pb.CreateSourceRequest, context: Context) -> pb.CreateSourceResponse:
        await self._tables.known(request.parent)
        await self._check(request.parent, request.source)
        if request.source_id:
            names.check_id(request.source_id, "source_id")
        source_id = request.source_id or await self._free_id(request)
        asked = request.source
        wanted = pb.Source(
            name=f"{request.parent}/sources/{source_id}",
            split=asked.split,
            split_rules=asked.split_rules,
            exclude=asked.exclude,
            include=asked.include,
            honour_gitattributes=asked.honour_gitattributes,
            sync_interval_seconds=asked.sync_interval_seconds,
            state=pb.SOURCE_STATE_PENDING,
            generation=1,
            request_id=request.request_id,
        )
        _copy_origin(asked, wanted)
        wanted.create_time.GetCurrentTime()
        try:
            return pb.CreateSourceResponse(source=await self._tables.sources.create(wanted))
        except ResourceExists:
            there = await self._tables.sources.get(wanted.name)
            same_request(there, _choices(there) == _choices(wanted), request.request_id)
            return pb.CreateSourceResponse(source=there)

    async def GetSource(self, request: pb.GetSourceRequest, context: Context) -> pb.GetSourceResponse:
        names.parse(names.SOURCE, request.name)
        return pb.GetSourceResponse(source=await self._tables.sources.get(request.name))

    async def ListSources(self, request: pb.ListSourcesRequest, context: Context) -> pb.ListSourcesResponse:
        await self._tables.known(request.parent)
        found, token = await self._tables.sources.page(request.parent, request.page_size, request.page_token)
        return pb.ListSourcesResponse(sources=found, next_page_token=token)

    async def UpdateSource(self, request: pb.UpdateSourceRequest, context: Context) -> pb.UpdateSourceResponse:
        asked = request.source
        names.parse(names.SOURCE, asked.name, field="source.name")
        _check_rules(asked)

        def change(record: pb.Source) -> None:
            record.split = asked.split
            del record.split_rules[:]
            record.split_rules.extend(asked.split_rules)
            record.exclude[:] = asked.exclude
            record.include[:] = asked.include
            record.honour_gitattributes = asked.honour_gitattributes

        stored = await self._tables.sources.mutate(asked.name, change, etag=asked.etag)
        return pb.UpdateSourceResponse(source=stored)

    async def SyncSource(self, request: pb.SyncSourceRequest, context: Context) -> pb.SyncSourceResponse:
        names.parse(names.SOURCE, request.name)

        def change(record: pb.Source) -> None:
            if record.fetched_generation == record.generation:  # else one is due already
                record.generation += 1
                record.state = pb.SOURCE_STATE_PENDING

        return pb.SyncSourceResponse(source=await self._tables.sources.mutate(request.name, change))

    async def DeleteSource(self, request: pb.DeleteSourceRequest, context: Context) -> pb.DeleteSourceResponse:
        names.parse(names.SOURCE, request.name)
        await self._tables.sources.delete(request.name, etag=request.etag)
        return pb.DeleteSourceResponse()

    async def WatchSource(
        self, request: pb.WatchSourceRequest, context: Context
    ) -> AsyncIterator[pb.WatchSourceResponse]:
        names.parse(names.SOURCE, request.name)
        async for source in self._tables.sources.watch(request.name):
            yield pb.WatchSourceResponse(source=source)

    async def _check(self, parent: str, source: pb.Source) -> None:
        """Refuses at once what no fetch could make good."""
        allowed = self._settings.ingest_allowed_urls
        match source.WhichOneof("origin"):
            case "git":
                git.check_url(source.git.url, allowed)
                git.check_ref(source.git.ref)
                if source.git.credential or source.git.submodules:
                    raise NotSupported(
                        "credentials and submodules are not supported yet",
                        field="source.git",
                        hint="Give the service's user an SSH key, or upload a git bundle of the repository.",
                    )
            case "bundle":
                git.check_ref(source.bundle.ref)
                await self._check_upload(parent, source.bundle.upload)
            case "archive":
                await self._check_upload(parent, source.archive.upload)
            case "file":
                await self._check_upload(parent, source.file.upload)
                if plain_path(source.file.path, self._settings.limits.max_path_bytes) is None:
                    raise InvalidArgument(
                        f"{source.file.path[:200]!r} is no path of a file",
                        field="source.file.path",
                        hint="Give a relative path with forward slashes, for example src/app.py.",
                    )
            case "url":
                url.check_url(source.url.url, allowed)
                if source.url.sha256:
                    check_sha256(source.url.sha256, "source.url.sha256")
            case _:
                raise InvalidArgument(
                    "the source says not where it comes from",
                    field="source.origin",
                    hint="Set one of git, bundle, archive, file and url.",
                )
        _check_rules(source)

    async def _check_upload(self, parent: str, name: str) -> None:
        names.parse(names.UPLOAD, name, field="upload")
        if names.project_of(name) != parent:
            raise InvalidArgument(
                f"{name} is of another project than {parent}", field="upload", hint="Upload it to this project."
            )
        await self._tables.uploads.get(name)

    async def _free_id(self, request: pb.CreateSourceRequest) -> str:
        """An id made of the origin's name; the same one when the same request comes again."""
        wanted = _id_from(request.source)
        taken = {s.name.rsplit("/", 1)[1]: s for s in await self._tables.sources.all(request.parent + "/sources/")}
        number, chosen = 1, wanted
        while chosen in taken and not (request.request_id and taken[chosen].request_id == request.request_id):
            number += 1
            chosen = f"{wanted}-{number}"
        return chosen


def _check_rules(source: pb.Source) -> None:
    Masks(source.exclude, field="source.exclude")
    Masks(source.include, field="source.include")
    Splits(source.split, source.split_rules)
    if source.sync_interval_seconds:
        raise NotSupported(
            "syncing on a schedule is not supported yet",
            field="source.sync_interval_seconds",
            hint="Leave it 0 and call SyncSource.",
        )


def _id_from(source: pb.Source) -> str:
    kind = source.WhichOneof("origin") or "source"
    told = {"git": source.git.url, "url": source.url.url, "file": source.file.path}.get(kind, "")
    last = re.split(r"[/:]", told.rstrip("/"))[-1].removesuffix(".git")
    return re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[:50].strip("-") or kind


def _copy_origin(asked: pb.Source, to: pb.Source) -> None:
    kind = asked.WhichOneof("origin")
    if kind is not None:
        getattr(to, kind).CopyFrom(getattr(asked, kind))


def _choices(source: pb.Source) -> tuple[object, ...]:
    """What the caller chose."""
    rules = [(rule.pattern, rule.split) for rule in source.split_rules]
    kind = source.WhichOneof("origin") or ""
    return origin_of(source), getattr(source, kind), source.split, rules, list(source.exclude), list(source.include)
