"""The ingest service over gRPC, on the fakes and on the real NATS and S3 servers, through the typed client."""

from __future__ import annotations

import hashlib
import io
import secrets
import subprocess
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import BinaryIO

import grpc
import pytest

from codegraft.common.v1.split_pb2 import Split
from codegraft.event.v1.events_pb2 import ProjectChanged
from codegraft.ingest.v1 import source_pb2, upload_pb2, upload_pb2_grpc
from services.client import AsyncCodegraft
from services.core import errors
from services.core.runtime import Runtime
from services.core.store import MemoryStore
from services.core.store.blobs import Blobs
from services.ingest.assembly import Ingest
from services.ingest.config import IngestSettings
from tests.conftest import NatsServer, S3Address
from tests.listening import first_of
from tests.servers.ingest import serving

Start = Callable[[Runtime], AbstractAsyncContextManager[AsyncCodegraft]]


@pytest.fixture(params=["memory", "real"])
async def runtime(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Runtime]:
    if request.param == "memory":
        yield Runtime.memory(tmp_path)
        return
    nats: NatsServer = request.getfixturevalue("nats_server")
    s3: S3Address = request.getfixturevalue("s3_server")
    settings = IngestSettings(
        nats_url=nats.url, nats_user=nats.user, nats_password=nats.password,
        s3_endpoint=s3.endpoint, s3_access_key=s3.access_key, s3_secret_key=s3.secret_key, s3_bucket=s3.bucket,
        cache_dir=tmp_path,
    )  # fmt: skip
    async with Runtime.open("ingest", settings) as opened:
        yield opened


@pytest.fixture
async def client(runtime: Runtime, tmp_path: Path) -> AsyncIterator[AsyncCodegraft]:
    async with serving(Ingest(runtime, IngestSettings(cache_dir=tmp_path))) as connected:
        yield connected


@pytest.fixture
def project() -> str:
    return f"p-{secrets.token_hex(4)}"


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def bundle(folder: Path) -> Path:
    repo = folder / "repo"
    repo.mkdir()
    (repo / "app.py").write_text("print(1)\n")
    git = ["git", "-C", str(repo), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    for arguments in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    subprocess.run([*git, "bundle", "create", "-q", str(folder / "b"), "--all"], check=True)
    return folder / "b"


async def test_three_kinds_of_source_become_one_snapshot(client: AsyncCodegraft, project: str, tmp_path: Path) -> None:
    await client.projects.create(project)
    added = [
        await client.sources.add_bundle(project, bundle(tmp_path), source_id="repo"),
        await client.sources.add_archive(
            project, archive({"a/x.py": b"x = 1\n", "a/y.py": b"y = 2\n"}), source_id="lib"
        ),
        await client.sources.add_file(project, b"z = 3\n", path="z.py", source_id="held-out", split=Split.SPLIT_TEST),
    ]
    ready = [await client.sources.wait(source.name) for source in added]
    assert [source.file_count for source in ready] == [1, 2, 1]
    assert len(ready[0].commit) == 40
    snapshot = await client.snapshots.create(project)
    files = [
        (f.source.rsplit("/", 1)[1], f.path, Split.Name(f.split)) async for f in client.snapshots.files(snapshot.name)
    ]
    assert files == [
        ("held-out", "z.py", "SPLIT_TEST"),
        ("lib", "a/x.py", "SPLIT_AUTO"),
        ("lib", "a/y.py", "SPLIT_AUTO"),
        ("repo", "app.py", "SPLIT_AUTO"),
    ]
    assert (await client.snapshots.create(project)).name == snapshot.name
    assert (await client.snapshots.get(f"projects/{project}/snapshots/latest")).digest == snapshot.digest
    paged = [f.path async for f in client.snapshots.files(snapshot.name, page_size=3)]
    assert paged == [path for _, path, _ in files]


async def test_creating_twice(client: AsyncCodegraft, project: str) -> None:
    first = await client.projects.create(project, title="One", request_id="r")
    assert await client.projects.create(project, title="One", request_id="r") == first
    with pytest.raises(errors.RequestIdReused):
        await client.projects.create(project, title="Two", request_id="r")
    with pytest.raises(errors.ResourceExists):
        await client.projects.create(project, request_id="other")


async def test_who_follows_hears_of_projects_and_since_when_texts_are_kept(
    client: AsyncCodegraft, runtime: Runtime, project: str
) -> None:
    told = runtime.events.subscribe("codegraft.ingest.project.changed.v1")
    first = await first_of(runtime.events, told)
    made = await client.projects.create(project)
    assert not made.HasField("keep_completions_time")
    made.keep_completions = True
    on = await client.projects.update(made)
    on.title = "Another"
    assert (await client.projects.update(on)).keep_completions_time == on.keep_completions_time
    assert on.keep_completions_time.ToNanoseconds() > on.create_time.ToNanoseconds()
    on.keep_completions, on.etag = False, ""
    assert not (await client.projects.update(on)).HasField("keep_completions_time")
    await client.projects.delete(project)
    events = [await first, *[await anext(aiter(told)) for _ in range(4)]]
    assert [event.unpack(ProjectChanged).deleted for event in events] == [False] * 4 + [True]
    assert {event.subject for event in events} == {f"projects/{project}"} and len({event.id for event in events}) == 5


async def test_mistakes_have_their_reason_and_field(client: AsyncCodegraft, project: str) -> None:
    await client.projects.create(project)
    git = source_pb2.Source(git=source_pb2.GitSource(url="file:///etc"))
    missing = source_pb2.Source(archive=source_pb2.ArchiveSource(upload=f"projects/{project}/uploads/{'0' * 64}"))
    masked = source_pb2.Source(git=source_pb2.GitSource(url="https://host/x"), exclude=["!"])
    cases: list[tuple[type[errors.CodegraftError], str, object]] = [
        (errors.InvalidName, "project_id", client.projects.create("Not Valid")),
        (errors.ProjectNotFound, "name", client.projects.get("nobody")),
        (errors.ProjectNotFound, "parent", client.snapshots.create("nobody")),
        (errors.NoSources, "parent", client.snapshots.create(project)),
        (errors.InvalidGitUrl, "git.url", client.sources.add(project, git)),
        (errors.UploadNotFound, "name", client.sources.add(project, missing)),
        (errors.InvalidMask, "source.exclude", client.sources.add(project, masked)),
        (errors.InvalidArgument, "source.origin", client.sources.add(project, source_pb2.Source())),
        (errors.SourceNotFound, "name", client.sources.get(f"projects/{project}/sources/x")),
        (errors.SnapshotNotFound, "name", client.snapshots.get(f"projects/{project}/snapshots/latest")),
        (errors.InvalidPageSize, "page_size", anext(aiter(client.sources.list(project, -1)))),
    ]
    for error, field, call in cases:
        with pytest.raises(error) as caught:
            await call  # type: ignore[misc]
        assert caught.value.field == field, error


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no archive at all", errors.BrokenArchive),
        (archive({"a.py": b"x" * 5000})[:60], errors.BrokenArchive),
        (archive({}), errors.EmptySource),
        (archive({"../a.py": b"x"}), errors.EmptySource),
    ],
    ids=["no archive", "cut", "empty", "outside"],
)
async def test_a_bad_archive_fails_with_its_reason(
    client: AsyncCodegraft, project: str, content: bytes, reason: type[errors.CodegraftError]
) -> None:
    await client.projects.create(project)
    source = await client.sources.add_archive(project, content, source_id="bad")
    with pytest.raises(reason) as caught:
        await client.sources.wait(source.name)
    assert caught.value.hint
    assert (await client.sources.get(source.name)).state == source_pb2.SOURCE_STATE_FAILED


async def test_empty_repository_fails_with_its_reason(client: AsyncCodegraft, project: str, tmp_path: Path) -> None:
    await client.projects.create(project)
    source = await client.sources.add_bundle(project, bundle(tmp_path), subpath="nothing-here")
    with pytest.raises(errors.EmptySource):
        await client.sources.wait(source.name)


async def test_removing_and_syncing(client: AsyncCodegraft, project: str) -> None:
    await client.projects.create(project)
    source = await client.sources.add_file(project, b"a = 1\n", path="a.py")
    assert source.name.endswith("/sources/a-py")
    before = await client.sources.wait(source.name)
    await client.sources.sync(source.name)
    after = await client.sources.wait(source.name)
    assert (after.generation, after.content_digest) == (2, before.content_digest)
    with pytest.raises(errors.ProjectNotEmpty):
        await client.projects.delete(project)
    async with aclosing(client.sources.watch_all(project)) as everybodys:
        assert (await anext(everybodys)).source == after
        await client.sources.remove(source.name)
        assert (await anext(everybodys)).removed == source.name
    async with aclosing(client.sources.watch_all(project)) as everybodys:
        assert (await anext(everybodys)).removed == source.name, "whoever lists first and then watches misses nothing"
    assert [s async for s in client.sources.list(project)] == []
    await client.projects.delete(project)
    with pytest.raises(errors.ProjectNotFound):
        await client.projects.get(project)


async def test_an_upload_goes_on_where_it_broke_off(client: AsyncCodegraft, project: str) -> None:
    await client.projects.create(project)
    content = secrets.token_bytes(3 << 20)
    digest = hashlib.sha256(content).hexdigest()
    header = upload_pb2.UploadHeader(parent=f"projects/{project}", sha256=digest, size=len(content), filename="x")
    part = upload_pb2.UploadChunk(offset=0, data=content[: 1 << 20])
    async with grpc.aio.insecure_channel(client.addresses.ingest) as channel:
        stub = upload_pb2_grpc.UploadServiceStub(channel)
        messages = [upload_pb2.UploadContentRequest(header=header), upload_pb2.UploadContentRequest(chunk=part)]
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.UploadContent(iter(messages))
        state = await stub.GetUpload(upload_pb2.GetUploadRequest(parent=header.parent, sha256=digest))
        assert (state.upload.offset, state.upload.complete) == (1 << 20, False)
        other = await client.projects.create(f"{project}-2")
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.UploadContent(iter([header_of(other.name, header), messages[1]]))
        await client.projects.delete(other.name)
        await client.projects.create(f"{project}-2")
        state = await stub.GetUpload(upload_pb2.GetUploadRequest(parent=other.name, sha256=digest))
        assert state.upload.offset == 0, "a new project goes on with nothing that one of its name before began"
    assert (await client.sources.upload(project, content)).complete
    assert (await client.sources.upload(project, content)).sha256 == digest, "the same once more costs nothing"


def header_of(parent: str, header: upload_pb2.UploadHeader) -> upload_pb2.UploadContentRequest:
    """The same for another project."""
    copy = upload_pb2.UploadHeader()
    copy.CopyFrom(header)
    copy.parent = parent
    return upload_pb2.UploadContentRequest(header=copy)


async def test_an_upload_with_a_wrong_digest_is_refused(client: AsyncCodegraft, project: str) -> None:
    await client.projects.create(project)
    header = upload_pb2.UploadHeader(parent=f"projects/{project}", sha256="0" * 64, size=3, filename="x")
    chunk = upload_pb2.UploadChunk(offset=0, data=b"abc")
    messages = [upload_pb2.UploadContentRequest(header=header), upload_pb2.UploadContentRequest(chunk=chunk)]
    async with grpc.aio.insecure_channel(client.addresses.ingest) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await upload_pb2_grpc.UploadServiceStub(channel).UploadContent(iter(messages))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


class FailingStore(MemoryStore):
    """A store that fails as long as it is told to."""

    failing = False

    async def put_stream(self, key: str, stream: BinaryIO, size: int) -> None:
        if self.failing:
            raise errors.StoreUnavailable("injected", retry_after=60)
        await super().put_stream(key, stream, size)


async def test_a_store_that_fails_in_an_upload_leaves_nothing_visible(tmp_path: Path, project: str) -> None:
    runtime = Runtime.memory(tmp_path)
    store = FailingStore()
    runtime.store, runtime.blobs = store, Blobs(store)
    content = b"x = 1\n" * 1000
    async with serving(Ingest(runtime, IngestSettings(cache_dir=tmp_path))) as client:
        await client.projects.create(project)
        store.failing = True
        with pytest.raises(errors.StoreUnavailable):
            await client.sources.upload(project, content)
        missing = source_pb2.FileSource(
            upload=f"projects/{project}/uploads/{hashlib.sha256(content).hexdigest()}", path="x.py"
        )
        with pytest.raises(errors.UploadNotFound):
            await client.sources.add(project, source_pb2.Source(file=missing))
        store.failing = False
        assert (await client.sources.upload(project, content)).complete


async def test_a_fetch_that_died_is_done_by_the_next_process(tmp_path: Path, project: str) -> None:
    runtime = Runtime.memory(tmp_path)
    ingest = Ingest(runtime, IngestSettings(cache_dir=tmp_path))
    async with serving(Ingest(runtime, IngestSettings(cache_dir=tmp_path))) as client:
        await client.projects.create(project)
        source = await client.sources.add_file(project, b"a = 1\n", path="a.py")
        await client.sources.wait(source.name)

    def died(record: source_pb2.Source) -> None:
        record.state, record.generation = source_pb2.SOURCE_STATE_FETCHING, 2

    await ingest.tables.sources.mutate(source.name, died)
    async with serving(Ingest(runtime, IngestSettings(cache_dir=tmp_path))) as client:
        assert (await client.sources.wait(source.name)).fetched_generation == 2
