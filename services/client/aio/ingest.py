"""Projects, sources, uploads and snapshots."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import grpc

from codegraft.common.v1.split_pb2 import Split
from codegraft.ingest.v1 import (
    credential_pb2,
    credential_pb2_grpc,
    project_pb2,
    project_pb2_grpc,
    snapshot_pb2,
    snapshot_pb2_grpc,
    source_pb2,
    source_pb2_grpc,
    upload_pb2,
    upload_pb2_grpc,
)
from services.client import retry
from services.client.aio.caller import Caller, new_request_id
from services.client.content import Content
from services.core import names
from services.core.errors import CodegraftError, UploadMismatch, by_reason

SNAPSHOT_SECONDS = 600.0
"""Least deadline of taking a snapshot: it reads the listings of all sources."""


def project_name(project: str) -> str:
    """``projects/acme`` for "acme" and for itself."""
    return project if "/" in project else names.build(names.PROJECT, project=project)


class Projects:
    """Name spaces of sources, datasets, runs and the serving choice."""

    def __init__(self, channel: grpc.aio.Channel, caller: Caller) -> None:
        self._stub = project_pb2_grpc.ProjectServiceStub(channel)
        self._caller = caller

    async def create(
        self,
        project_id: str,
        *,
        title: str = "",
        exclude: Sequence[str] = (),
        include: Sequence[str] = (),
        languages_off: Sequence[str] = (),
        exclude_licenses: Sequence[str] = (),
        request_id: str = "",
    ) -> project_pb2.Project:
        """Creates a project.

        Args:
            exclude: masks in .gitignore syntax for all its sources.
            include: for sources without include masks of their own: files that match none are left out.
            languages_off: languages that scans leave out, by linguist name.
            exclude_licenses: licences that scans leave out, by SPDX id; ``*`` stands for anything.
            request_id: idempotency key; a fresh one when empty.

        Raises:
            InvalidName: the id is not valid.
            ResourceExists: there is one of that id.
        """
        request = project_pb2.CreateProjectRequest(
            project_id=project_id,
            project=project_pb2.Project(
                title=title,
                exclude=exclude,
                include=include,
                languages_off=languages_off,
                exclude_licenses=exclude_licenses,
            ),
            request_id=request_id or new_request_id(),
        )
        return (await self._caller.unary(self._stub.CreateProject, request, repeat=True)).project

    async def get(self, project: str) -> project_pb2.Project:
        """One project. Raises ProjectNotFound."""
        request = project_pb2.GetProjectRequest(name=project_name(project))
        return (await self._caller.unary(self._stub.GetProject, request, repeat=True)).project

    async def list(self, page_size: int = 0) -> AsyncIterator[project_pb2.Project]:
        """Every project, by name."""
        request = project_pb2.ListProjectsRequest(page_size=page_size)
        async for page in self._caller.pages(self._stub.ListProjects, request):
            for project in page.projects:
                yield project

    async def update(self, project: project_pb2.Project) -> project_pb2.Project:
        """Stores title, masks, languages and licences. Raises EtagMismatch when it changed since it was read."""
        request = project_pb2.UpdateProjectRequest(project=project)
        return (await self._caller.unary(self._stub.UpdateProject, request, repeat=False)).project

    async def delete(self, project: str, *, force: bool = False, etag: str = "") -> None:
        """Deletes a project; with force its sources too. Raises ProjectNotEmpty."""
        request = project_pb2.DeleteProjectRequest(name=project_name(project), force=force, etag=etag)
        await self._caller.unary(self._stub.DeleteProject, request, repeat=False)


class Sources:
    """Where a project's code comes from."""

    def __init__(self, channel: grpc.aio.Channel, uploads: grpc.Channel, caller: Caller) -> None:
        self._stub = source_pb2_grpc.SourceServiceStub(channel)
        self._states = upload_pb2_grpc.UploadServiceStub(channel)
        self._uploads = upload_pb2_grpc.UploadServiceStub(uploads)
        self._caller = caller

    async def add(
        self, project: str, source: source_pb2.Source, *, source_id: str = "", request_id: str = ""
    ) -> source_pb2.Source:
        """Adds a source; it is fetched in the background, see :meth:`wait`.

        Args:
            source_id: empty lets the service choose one.
            request_id: idempotency key; a fresh one when empty.

        Raises:
            InvalidGitUrl: the URL has a form that is refused.
            ProjectNotFound, UploadNotFound, ResourceExists.
        """
        request = source_pb2.CreateSourceRequest(
            parent=project_name(project), source_id=source_id, source=source, request_id=request_id or new_request_id()
        )
        return (await self._caller.unary(self._stub.CreateSource, request, repeat=True)).source

    async def add_git(
        self,
        project: str,
        url: str,
        *,
        ref: str = "",
        subpath: str = "",
        credential: str = "",
        submodules: bool = False,
        source_id: str = "",
        split: Split = Split.SPLIT_AUTO,
    ) -> source_pb2.Source:
        """Adds a git repository by its URL.

        Args:
            credential: full name of what opens a private one.
            submodules: fetch its submodules too.
        """
        git = source_pb2.GitSource(url=url, ref=ref, subpath=subpath, credential=credential, submodules=submodules)
        return await self.add(project, source_pb2.Source(git=git, split=split), source_id=source_id)

    async def add_bundle(
        self,
        project: str,
        content: str | Path | bytes,
        *,
        ref: str = "",
        subpath: str = "",
        source_id: str = "",
        split: Split = Split.SPLIT_AUTO,
    ) -> source_pb2.Source:
        """Uploads a git bundle (see ``git bundle create``) and adds it."""
        upload = await self.upload(project, content)
        bundle = source_pb2.BundleSource(upload=upload.name, ref=ref, subpath=subpath)
        return await self.add(project, source_pb2.Source(bundle=bundle, split=split), source_id=source_id)

    async def add_archive(
        self,
        project: str,
        content: str | Path | bytes,
        *,
        subpath: str = "",
        source_id: str = "",
        split: Split = Split.SPLIT_AUTO,
    ) -> source_pb2.Source:
        """Uploads an archive (zip, tar, tar.gz, tar.bz2, tar.xz, tar.zst) and adds it."""
        upload = await self.upload(project, content)
        archive = source_pb2.ArchiveSource(upload=upload.name, subpath=subpath)
        return await self.add(project, source_pb2.Source(archive=archive, split=split), source_id=source_id)

    async def add_file(
        self,
        project: str,
        content: str | Path | bytes,
        *,
        path: str = "",
        source_id: str = "",
        split: Split = Split.SPLIT_AUTO,
    ) -> source_pb2.Source:
        """Uploads a single file and adds it.

        Args:
            path: its path within the source, for its language; the file's own name when empty.
        """
        upload = await self.upload(project, content, filename=path)
        file = source_pb2.FileSource(upload=upload.name, path=path or upload.filename)
        return await self.add(project, source_pb2.Source(file=file, split=split), source_id=source_id)

    async def upload(self, project: str, content: str | Path | bytes, *, filename: str = "") -> upload_pb2.Upload:
        """Sends a file or bytes in chunks, taken up where it stopped when the connection breaks.

        Content that the project has already is not sent again. It is given up when some tries in a row bring nothing
        forward.

        Raises:
            InvalidArgument: the file cannot be read.
            UploadMismatch: the file changed, or could not be read on, while it was sent.
            ProjectNotFound, LimitExceeded, StoreUnavailable.
        """
        measured = await asyncio.to_thread(Content.of, content, filename)
        parent = project_name(project)
        state = upload_pb2.GetUploadRequest(parent=parent, sha256=measured.sha256)
        reached, failures = 0, 0
        while True:
            arrived = (await self._caller.unary(self._states.GetUpload, state, repeat=True)).upload
            if arrived.offset > reached:
                reached, failures = arrived.offset, 0
            try:
                return (
                    await self._caller.upload(self._uploads.UploadContent, _parts(parent, measured, arrived))
                ).upload
            except CodegraftError as failure:
                error = failure
            # The bytes of a broken call may still be arriving when the next one asks how many there are.
            overtaken = isinstance(error, UploadMismatch) and error.field == "chunk.offset"
            if failures + 1 >= retry.ATTEMPTS or not (overtaken or retry.will_pass(error)):
                raise error
            await asyncio.sleep(retry.delay(error, failures))
            failures += 1

    async def arrived(self, project: str, sha256: str) -> upload_pb2.Upload:
        """How much of an upload is there, for callers of :meth:`send`. Raises ProjectNotFound."""
        request = upload_pb2.GetUploadRequest(parent=project_name(project), sha256=sha256)
        return (await self._caller.unary(self._states.GetUpload, request, repeat=True)).upload

    async def send(
        self, project: str, announced: upload_pb2.Upload, offset: int, parts: Iterator[bytes]
    ) -> upload_pb2.Upload:
        """Sends the rest of an upload once, for callers whose bytes come from elsewhere; :meth:`upload` does all of it.

        Args:
            announced: with its sha256, size and filename.
            offset: where the parts begin: as much as has arrived.
            parts: at most 1 MiB each; taken in another thread. When they end early, what was sent is kept.

        Raises:
            UploadMismatch: the parts do not begin where the upload stands, ended early, or are not what was announced.
            InvalidArgument, ProjectNotFound, LimitExceeded, StoreUnavailable.
        """

        def messages() -> Iterator[upload_pb2.UploadContentRequest]:
            yield upload_pb2.UploadContentRequest(
                header=upload_pb2.UploadHeader(
                    parent=project_name(project),
                    sha256=announced.sha256,
                    size=announced.size,
                    filename=announced.filename,
                )
            )
            position = offset
            for data in parts:
                yield upload_pb2.UploadContentRequest(chunk=upload_pb2.UploadChunk(offset=position, data=data))
                position += len(data)

        return (await self._caller.upload(self._uploads.UploadContent, messages())).upload

    async def get(self, name: str) -> source_pb2.Source:
        """One source, by its full name. Raises SourceNotFound."""
        request = source_pb2.GetSourceRequest(name=name)
        return (await self._caller.unary(self._stub.GetSource, request, repeat=True)).source

    async def list(self, project: str, page_size: int = 0) -> AsyncIterator[source_pb2.Source]:
        """Every source of a project, by name."""
        request = source_pb2.ListSourcesRequest(parent=project_name(project), page_size=page_size)
        async for page in self._caller.pages(self._stub.ListSources, request):
            for source in page.sources:
                yield source

    async def update(self, source: source_pb2.Source) -> source_pb2.Source:
        """Stores split, rules, masks, sync interval, and the origin if it is set: another one is fetched at once.

        Raises:
            EtagMismatch: it changed since it was read.
            InvalidArgument: the origin is of another kind than the stored one.
        """
        request = source_pb2.UpdateSourceRequest(source=source)
        return (await self._caller.unary(self._stub.UpdateSource, request, repeat=False)).source

    async def sync(self, name: str) -> source_pb2.Source:
        """Fetches a source again, in the background; see :meth:`wait`."""
        request = source_pb2.SyncSourceRequest(name=name)
        return (await self._caller.unary(self._stub.SyncSource, request, repeat=True)).source

    async def remove(self, name: str, *, etag: str = "") -> None:
        """Removes a source; existing snapshots keep its files."""
        await self._caller.unary(
            self._stub.DeleteSource, source_pb2.DeleteSourceRequest(name=name, etag=etag), repeat=False
        )

    async def forget(self, name: str, *, etag: str = "") -> source_pb2.ForgetSourceResponse:
        """Removes a source and every snapshot with its files; tells those, and the datasets that still hold some."""
        request = source_pb2.ForgetSourceRequest(name=name, etag=etag)
        return await self._caller.unary(self._stub.ForgetSource, request, repeat=False)

    async def watch(self, name: str) -> AsyncIterator[source_pb2.Source]:
        """The source as it is now, then after every change."""
        async for message in self._caller.follow(self._stub.WatchSource, source_pb2.WatchSourceRequest(name=name)):
            yield message.source

    async def watch_all(self, project: str) -> AsyncIterator[source_pb2.WatchSourcesResponse]:
        """Every source of a project in no order, then each that is new, changes or is removed, without end."""
        request = source_pb2.WatchSourcesRequest(parent=project_name(project))
        async for message in self._caller.follow(self._stub.WatchSources, request):
            yield message

    async def wait(self, name: str) -> source_pb2.Source:
        """Waits until the last asked-for fetch is done.

        Raises:
            CodegraftError: the fetch failed; the class that belongs to its reason, with its hint.
        """
        async for source in self.watch(name):
            if source.fetched_generation < source.generation:
                continue
            if source.state == source_pb2.SOURCE_STATE_FAILED:
                raise by_reason(source.failure.reason)(source.failure.message, hint=source.failure.hint)
            if source.state == source_pb2.SOURCE_STATE_READY:
                return source
        return await self.get(name)


class Credentials:
    """What opens private repositories. Secrets go in and never come out."""

    def __init__(self, channel: grpc.aio.Channel, caller: Caller) -> None:
        self._stub = credential_pb2_grpc.CredentialServiceStub(channel)
        self._caller = caller

    async def create(
        self,
        project: str,
        secret: credential_pb2.CredentialSecret,
        *,
        credential_id: str = "",
        title: str = "",
        known_hosts: Sequence[str] = (),
        pin_on_first_use: bool = False,
        request_id: str = "",
    ) -> credential_pb2.Credential:
        """Stores a credential.

        Args:
            secret: a token, a private key, or the wish for a new key.
            known_hosts: SSH: host keys, as ``ssh-keyscan`` prints them.
            pin_on_first_use: SSH: believe the key of a host that is not known yet.

        Raises:
            InvalidCredential: the secret or a host key cannot be read.
            CredentialsDisabled: the service has no key to encrypt it with.
            ProjectNotFound, ResourceExists.
        """
        request = credential_pb2.CreateCredentialRequest(
            parent=project_name(project),
            credential_id=credential_id,
            credential=credential_pb2.Credential(
                title=title, known_hosts=known_hosts, pin_on_first_use=pin_on_first_use
            ),
            secret=secret,
            request_id=request_id or new_request_id(),
        )
        return (await self._caller.unary(self._stub.CreateCredential, request, repeat=True)).credential

    async def create_token(
        self, project: str, token: str, *, username: str = "", credential_id: str = "", title: str = ""
    ) -> credential_pb2.Credential:
        """Stores a token for https."""
        secret = credential_pb2.CredentialSecret(https_token=credential_pb2.HttpsToken(username=username, token=token))
        return await self.create(project, secret, credential_id=credential_id, title=title)

    async def generate_ssh_key(
        self,
        project: str,
        *,
        credential_id: str = "",
        title: str = "",
        known_hosts: Sequence[str] = (),
        pin_on_first_use: bool = False,
    ) -> credential_pb2.Credential:
        """Makes a new SSH key; give the repository the ``public_key`` of the answer."""
        secret = credential_pb2.CredentialSecret(generate_ssh_key=credential_pb2.GenerateSshKey())
        return await self.create(
            project,
            secret,
            credential_id=credential_id,
            title=title,
            known_hosts=known_hosts,
            pin_on_first_use=pin_on_first_use,
        )

    async def get(self, name: str) -> credential_pb2.Credential:
        """One credential, by its full name. Raises CredentialNotFound."""
        request = credential_pb2.GetCredentialRequest(name=name)
        return (await self._caller.unary(self._stub.GetCredential, request, repeat=True)).credential

    async def list(self, project: str, page_size: int = 0) -> AsyncIterator[credential_pb2.Credential]:
        """Every credential of a project, by name."""
        request = credential_pb2.ListCredentialsRequest(parent=project_name(project), page_size=page_size)
        async for page in self._caller.pages(self._stub.ListCredentials, request):
            for credential in page.credentials:
                yield credential

    async def update(
        self, credential: credential_pb2.Credential, secret: credential_pb2.CredentialSecret | None = None
    ) -> credential_pb2.Credential:
        """Stores title, host keys and pinning, and a new secret if one is given. Raises EtagMismatch."""
        request = credential_pb2.UpdateCredentialRequest(credential=credential, secret=secret)
        return (await self._caller.unary(self._stub.UpdateCredential, request, repeat=False)).credential

    async def delete(self, name: str, *, etag: str = "") -> None:
        """Deletes a credential. Raises CredentialInUse as long as a source has it."""
        request = credential_pb2.DeleteCredentialRequest(name=name, etag=etag)
        await self._caller.unary(self._stub.DeleteCredential, request, repeat=False)


class Snapshots:
    """The immutable content of all sources at one moment."""

    def __init__(self, channel: grpc.aio.Channel, caller: Caller) -> None:
        self._stub = snapshot_pb2_grpc.SnapshotServiceStub(channel)
        self._caller = caller

    async def create(self, project: str) -> snapshot_pb2.Snapshot:
        """Takes a snapshot; the same content gives the same one. Raises NoSources.

        It may take much longer than other calls: a deadline below ten minutes is not applied to it.
        """
        request = snapshot_pb2.CreateSnapshotRequest(parent=project_name(project), request_id=new_request_id())
        patient = self._caller.patient(SNAPSHOT_SECONDS)
        return (await patient.unary(self._stub.CreateSnapshot, request, repeat=True)).snapshot

    async def get(self, name: str) -> snapshot_pb2.Snapshot:
        """One snapshot by its full name; the id "latest" names the newest. Raises SnapshotNotFound."""
        request = snapshot_pb2.GetSnapshotRequest(name=name)
        return (await self._caller.unary(self._stub.GetSnapshot, request, repeat=True)).snapshot

    async def list(self, project: str, page_size: int = 0) -> AsyncIterator[snapshot_pb2.Snapshot]:
        """Every snapshot of a project, newest first."""
        request = snapshot_pb2.ListSnapshotsRequest(parent=project_name(project), page_size=page_size)
        async for page in self._caller.pages(self._stub.ListSnapshots, request):
            for snapshot in page.snapshots:
                yield snapshot

    async def files(self, name: str, page_size: int = 1000) -> AsyncIterator[snapshot_pb2.SnapshotFile]:
        """Every file of a snapshot, by source and path."""
        request = snapshot_pb2.ListSnapshotFilesRequest(parent=name, page_size=page_size)
        async for page in self._caller.pages(self._stub.ListSnapshotFiles, request):
            for file in page.files:
                yield file

    async def diff(
        self, base: str, target: str, page_size: int = 1000
    ) -> AsyncIterator[snapshot_pb2.SnapshotDifference]:
        """Every file that differs between two snapshots of a project, by source and path."""
        request = snapshot_pb2.DiffSnapshotsRequest(base=base, target=target, page_size=page_size)
        async for page in self._caller.pages(self._stub.DiffSnapshots, request):
            for difference in page.differences:
                yield difference

    async def delete(self, name: str) -> None:
        """Deletes a snapshot. Raises SnapshotInUse when a dataset was made of it."""
        request = snapshot_pb2.DeleteSnapshotRequest(name=name)
        await self._caller.unary(self._stub.DeleteSnapshot, request, repeat=False)

    async def collect_garbage(
        self, *, dry_run: bool = False, min_age_seconds: int = 0
    ) -> AsyncIterator[snapshot_pb2.CollectGarbageResponse]:
        """Removes what nothing refers to from the object store; yields counts so far, and the totals at the end."""
        request = snapshot_pb2.CollectGarbageRequest(dry_run=dry_run, min_age_seconds=min_age_seconds)
        async for counts in self._caller.stream(self._stub.CollectGarbage, request, lambda counts: counts):
            yield counts


def _parts(parent: str, content: Content, arrived: upload_pb2.Upload) -> Iterator[upload_pb2.UploadContentRequest]:
    """The messages of an upload: the header, then what has not arrived yet."""
    header = upload_pb2.UploadHeader(parent=parent, sha256=content.sha256, size=content.size, filename=content.filename)
    yield upload_pb2.UploadContentRequest(header=header)
    if arrived.complete:
        return
    try:
        for offset, data in content.chunks(arrived.offset):
            yield upload_pb2.UploadContentRequest(chunk=upload_pb2.UploadChunk(offset=offset, data=data))
    except OSError:
        # The file is gone. An exception in here would end the call as if its caller had cancelled it; when no more
        # comes, the service says how much is missing.
        return
