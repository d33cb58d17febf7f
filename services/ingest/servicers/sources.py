"""SourceService."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc

from codegraft.ingest.v1 import source_pb2 as pb
from codegraft.ingest.v1.credential_pb2 import CREDENTIAL_KIND_SSH_KEY
from codegraft.ingest.v1.source_pb2_grpc import SourceServiceServicer
from services.core import names
from services.core.auth.caller import current
from services.core.errors import InvalidArgument, NotFound, ResourceExists
from services.core.masks import Masks
from services.core.quota.places import Places
from services.core.quota.quotas import owners
from services.ingest.config import IngestSettings
from services.ingest.files import plain_path
from services.ingest.records import Tables, same_request
from services.ingest.snapshot import Splits, origin_of
from services.ingest.snapshots import Snapshots
from services.ingest.sources import git, url
from services.ingest.uploads import check_sha256

Context = grpc.aio.ServicerContext[Any, Any]
MIN_INTERVAL, MAX_INTERVAL = 10, 366 * 24 * 3600
"""Bounds of a sync interval, in seconds."""


class SourceServicer(SourceServiceServicer):
    """See the proto for what every call does and which errors it has. The fetcher does the work."""

    def __init__(self, tables: Tables, settings: IngestSettings, snapshots: Snapshots, places: Places) -> None:
        self._tables = tables
        self._places = places
        self._settings = settings
        self._guard = settings.guard
        self._snapshots = snapshots

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
            creator=current().subject,
        )
        _copy_origin(asked, wanted)
        _check_schedule(wanted)
        wanted.create_time.GetCurrentTime()
        if (there := await self._tables.sources.find(wanted.name)) is None:
            # A byte at least: how many there are is known once they are fetched, and then they are counted.
            async with self._places.claim(owners(current(), request.parent), wanted.name):
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
        kind = asked.WhichOneof("origin")
        if kind is not None:
            await self._check(names.project_of(asked.name), asked)
        _check_rules(asked)

        def change(record: pb.Source) -> None:
            if kind is not None:
                _replace_origin(record, asked, kind)
            record.sync_interval_seconds = asked.sync_interval_seconds
            record.split = asked.split
            del record.split_rules[:]
            record.split_rules.extend(asked.split_rules)
            record.exclude[:] = asked.exclude
            record.include[:] = asked.include
            record.honour_gitattributes = asked.honour_gitattributes
            _check_schedule(record)

        stored = await self._tables.sources.mutate(asked.name, change, etag=asked.etag)
        return pb.UpdateSourceResponse(source=stored)

    async def SyncSource(self, request: pb.SyncSourceRequest, context: Context) -> pb.SyncSourceResponse:
        names.parse(names.SOURCE, request.name)

        def change(record: pb.Source) -> None:
            if record.fetched_generation == record.generation:  # else one is due already
                record.generation += 1
                record.state = pb.SOURCE_STATE_PENDING

        async with self._places.claim(owners(current(), names.project_of(request.name)), request.name):
            return pb.SyncSourceResponse(source=await self._tables.sources.mutate(request.name, change))

    async def DeleteSource(self, request: pb.DeleteSourceRequest, context: Context) -> pb.DeleteSourceResponse:
        names.parse(names.SOURCE, request.name)
        await self._tables.sources.delete(request.name, etag=request.etag)
        return pb.DeleteSourceResponse()

    async def ForgetSource(self, request: pb.ForgetSourceRequest, context: Context) -> pb.ForgetSourceResponse:
        names.parse(names.SOURCE, request.name)
        project = names.project_of(request.name)
        source = await self._tables.sources.get(request.name)
        # The source goes first: no snapshot that is taken from now on has it.
        await self._tables.sources.delete(request.name, etag=request.etag)
        all_snapshots = await self._tables.snapshots.all(project + "/snapshots/")
        holding = {s.name for s in all_snapshots if any(part.source == request.name for part in s.sources)}
        datasets = await self._snapshots.datasets_of(project, holding)
        for name in sorted(holding):
            await self._snapshots.drop(name)
        upload = getattr(source, source.WhichOneof("origin") or "git", None)
        others = await self._tables.sources.all(project + "/sources/")
        if upload_name := getattr(upload, "upload", ""):
            in_use = any(getattr(getattr(s, s.WhichOneof("origin") or ""), "upload", "") == upload_name for s in others)
            if not in_use:
                with contextlib.suppress(NotFound):
                    await self._tables.uploads.delete(upload_name)
        return pb.ForgetSourceResponse(snapshots=sorted(holding), datasets=datasets)

    async def WatchSource(
        self, request: pb.WatchSourceRequest, context: Context
    ) -> AsyncIterator[pb.WatchSourceResponse]:
        names.parse(names.SOURCE, request.name)
        async for source in self._tables.sources.watch(request.name):
            yield pb.WatchSourceResponse(source=source)

    async def WatchSources(
        self, request: pb.WatchSourcesRequest, context: Context
    ) -> AsyncIterator[pb.WatchSourcesResponse]:
        names.parse(names.PROJECT, request.parent, field="parent")
        async for change in self._tables.sources.follow(request.parent + "/"):
            if change.message is None:
                yield pb.WatchSourcesResponse(removed=change.name)
            else:
                yield pb.WatchSourcesResponse(source=change.message)

    async def _check(self, parent: str, source: pb.Source) -> None:
        """Refuses at once what no fetch could make good."""
        match source.WhichOneof("origin"):
            case "git":
                git.check_url(source.git.url, self._guard)
                git.check_ref(source.git.ref, "git.ref")
                if source.git.credential:
                    await self._check_credential(parent, source.git)
            case "bundle":
                git.check_ref(source.bundle.ref, "bundle.ref")
                await self._check_upload(parent, source.bundle.upload)
            case "archive":
                await self._check_upload(parent, source.archive.upload)
            case "file":
                await self._check_upload(parent, source.file.upload)
                if plain_path(source.file.path, self._settings.limits) is None:
                    raise InvalidArgument(
                        f"{source.file.path[:200]!r} is no path of a file",
                        field="source.file.path",
                        hint="Give a relative path with forward slashes, for example src/app.py.",
                    )
            case "url":
                url.check_url(source.url.url, self._guard)
                if source.url.sha256:
                    check_sha256(source.url.sha256, "source.url.sha256")
            case _:
                raise InvalidArgument(
                    "the source says not where it comes from",
                    field="source.origin",
                    hint="Set one of git, bundle, archive, file and url.",
                )
        _check_rules(source)

    async def _check_credential(self, parent: str, origin: pb.GitSource) -> None:
        names.parse(names.CREDENTIAL, origin.credential, field="git.credential")
        if names.project_of(origin.credential) != parent:
            raise InvalidArgument(
                f"{origin.credential} is of another project than {parent}",
                field="git.credential",
                hint="Create it in this project.",
            )
        kind = (await self._tables.credentials.get(origin.credential)).credential.kind
        is_ssh = git.check_url(origin.url, self._guard).startswith("ssh:")
        if is_ssh != (kind == CREDENTIAL_KIND_SSH_KEY):
            raise InvalidArgument(
                "a token opens no ssh URL" if is_ssh else "an SSH key opens no https URL",
                field="git.credential",
                hint="Use a credential of the other kind, or the repository's other URL.",
            )

    async def _check_upload(self, parent: str, name: str) -> None:
        names.parse(names.UPLOAD, name, field="upload")
        if names.project_of(name) != parent:
            raise InvalidArgument(
                f"{name} is of another project than {parent}", field="upload", hint="Upload it to this project."
            )
        await self._tables.uploads.get(name)

    async def _id_from(self, source: pb.Source) -> str:
        """The last part of where it comes from."""
        kind = source.WhichOneof("origin") or "source"
        told = {"git": source.git.url, "url": source.url.url.partition("?")[0], "file": source.file.path}.get(kind, "")
        if kind in ("bundle", "archive"):
            told = (await self._tables.uploads.get(getattr(source, kind).upload)).filename
        last = re.split(r"[/:]", told.rstrip("/"))[-1]
        last = re.sub(r"\.(git|bundle|zip|tgz|tar|tar\.(gz|bz2|xz|zst))$", "", last)
        return re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[:50].strip("-") or kind

    async def _free_id(self, request: pb.CreateSourceRequest) -> str:
        """An id made of the origin's name; the same one when the same request comes again."""
        wanted = await self._id_from(request.source)
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
    if source.sync_interval_seconds and not MIN_INTERVAL <= source.sync_interval_seconds <= MAX_INTERVAL:
        raise InvalidArgument(
            f"sync_interval_seconds is {source.sync_interval_seconds}",
            field="source.sync_interval_seconds",
            hint=f"Give {MIN_INTERVAL} to {MAX_INTERVAL}, or 0 for never.",
        )


def _check_schedule(source: pb.Source) -> None:
    kind = source.WhichOneof("origin") or ""
    if source.sync_interval_seconds and kind not in ("git", "url"):
        raise InvalidArgument(
            f"a source that was uploaded ({kind}) never changes by itself",
            field="source.sync_interval_seconds",
            hint="Give the source a new upload when there is something new.",
        )


def _replace_origin(record: pb.Source, asked: pb.Source, kind: str) -> None:
    if record.WhichOneof("origin") != kind:
        raise InvalidArgument(
            f"the source is {record.WhichOneof('origin')}, and cannot become {kind}",
            field="source.origin",
            hint="Add a source of its own.",
        )
    if getattr(record, kind) == getattr(asked, kind):
        return
    _copy_origin(asked, record)
    record.commit = ""  # whatever it was: the next fetch must look
    record.generation += 1
    record.state = pb.SOURCE_STATE_PENDING


def _copy_origin(asked: pb.Source, to: pb.Source) -> None:
    kind = asked.WhichOneof("origin")
    if kind is not None:
        getattr(to, kind).CopyFrom(getattr(asked, kind))


def _choices(source: pb.Source) -> tuple[object, ...]:
    """What the caller chose."""
    rules = [(rule.pattern, rule.split) for rule in source.split_rules]
    kind = source.WhichOneof("origin") or ""
    return origin_of(source), getattr(source, kind), source.split, rules, list(source.exclude), list(source.include)
