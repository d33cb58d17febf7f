"""One suite over the fake and the real object store: what passes against MemoryStore holds for S3."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

import pytest

from codegraft.common.v1.artifact_pb2 import ArtifactFile
from codegraft.ingest.v1.snapshot_pb2 import SnapshotManifest
from codegraft.scanner.v1.dataset_pb2 import DatasetManifest
from services.cli.local import ports
from services.core import errors
from services.core.names import new_id
from services.core.rpc import context
from services.core.store import Artifacts, Blobs, MemoryStore, ObjectStore, Pack, Packs, Place, S3Store, StoredObject
from services.core.store.blobs import SMALL_BYTES, key
from services.core.store.s3 import S3Address


@pytest.fixture(params=["memory", "s3"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[ObjectStore]:
    if request.param == "memory":
        yield MemoryStore()
        return
    real = S3Store(request.getfixturevalue("s3_server"))
    await real.prepare()
    yield real
    real.close()


@pytest.fixture
def name() -> str:
    """A resource name that no other test uses, since all share one bucket."""
    return f"projects/{new_id('p')}/snapshots/s"


class Faulty:
    """A store whose n-th write fails, before or after it took effect."""

    def __init__(self, inner: ObjectStore, fail_at: int, *, after: bool = False) -> None:
        self._inner = inner
        self._left = fail_at
        self._after = after

    async def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        failing = self._count()
        if failing and not self._after:
            raise errors.StoreUnavailable("injected")
        result = await self._inner.put(key, data, if_absent=if_absent)
        if failing:
            raise errors.StoreUnavailable("injected")
        return result

    async def put_file(self, key: str, path: Path) -> None:
        if self._count():
            raise errors.StoreUnavailable("injected")
        await self._inner.put_file(key, path)

    def _count(self) -> bool:
        self._left -= 1
        return self._left == 0

    async def get(self, key: str) -> bytes:
        return await self._inner.get(key)

    async def get_file(self, key: str, path: Path) -> None:
        await self._inner.get_file(key, path)

    async def size(self, key: str) -> int | None:
        return await self._inner.size(key)

    async def put_stream(self, key: str, stream: BinaryIO, size: int) -> None:
        if self._count():
            raise errors.StoreUnavailable("injected")
        await self._inner.put_stream(key, stream, size)

    async def stat(self, key: str) -> StoredObject | None:
        return await self._inner.stat(key)

    def objects(self, prefix: str) -> AsyncIterator[StoredObject]:
        return self._inner.objects(prefix)

    def list(self, prefix: str) -> AsyncIterator[str]:
        return self._inner.list(prefix)

    async def delete(self, key: str) -> None:
        await self._inner.delete(key)


# --- objects ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 40], ids=["empty", "one", "binary"])
async def test_what_was_put_is_got(store: ObjectStore, name: str, data: bytes) -> None:
    assert await store.put(name, data) is True
    assert await store.get(name) == data
    assert await store.size(name) == len(data)


async def test_stat_tells_size_and_time(store: ObjectStore, name: str) -> None:
    assert await store.stat(name) is None
    before = datetime.now(UTC) - timedelta(seconds=2)  # S3 tells whole seconds
    await store.put(name, b"abc")
    found = await store.stat(name)
    assert found is not None and found.size == 3
    assert before <= found.modified <= datetime.now(UTC) + timedelta(seconds=2)
    assert [(one.key, one.size) async for one in store.objects(name)] == [(name, 3)]


@pytest.mark.parametrize("size", [0, 5, (17 << 20) + 3], ids=["empty", "small", "two parts"])
async def test_a_stream_is_stored(store: ObjectStore, name: str, size: int) -> None:
    data = os.urandom(size)
    await store.put_stream(name, io.BytesIO(data), size)
    assert await store.get(name) == data


async def test_a_stream_that_breaks_stores_nothing(store: ObjectStore, name: str) -> None:
    class Breaking(io.RawIOBase):
        left = 20

        def read(self, size: int = -1) -> bytes:
            self.left -= 1
            if not self.left:
                raise errors.Cancelled("injected")
            return b"x" * min(size, 1 << 20)

    with pytest.raises(errors.Cancelled):
        await store.put_stream(name, Breaking(), 40 << 20)  # type: ignore[arg-type]
    assert await store.stat(name) is None


async def test_files_are_read_out_of_packs(store: ObjectStore) -> None:
    blobs, files = Blobs(store), [os.urandom(size) for size in (10, 0, 300)]
    packed = Pack.of(files)
    await blobs.put(packed.data)
    reader = Packs(blobs)
    for place, data in zip(packed.places, files, strict=True):
        assert await reader.get(place, len(data), hashlib.sha256(data).hexdigest()) == data
    with pytest.raises(errors.DigestMismatch):
        await reader.get(packed.places[2], 300, hashlib.sha256(files[0]).hexdigest())
    with pytest.raises(errors.ObjectNotFound):
        await reader.get(Place("0" * 64, 0), 1, "0" * 64)


async def test_put_replaces(store: ObjectStore, name: str) -> None:
    await store.put(name, b"old and longer")
    await store.put(name, b"new")
    assert await store.get(name) == b"new"


async def test_keys_with_unusual_characters(store: ObjectStore, name: str) -> None:
    odd = f"{name}/a b+c%20ü&=#?.txt"
    await store.put(odd, b"odd")
    assert await store.put(odd, b"other", if_absent=True) is False
    assert await store.get(odd) == b"odd"
    assert [found async for found in store.list(name)] == [odd]


async def test_missing_objects(store: ObjectStore, name: str, tmp_path: Path) -> None:
    with pytest.raises(errors.ObjectNotFound, match=name):
        await store.get(name)
    with pytest.raises(errors.ObjectNotFound):
        await store.get_file(name, tmp_path / "f")
    assert await store.size(name) is None
    await store.delete(name)


async def test_delete(store: ObjectStore, name: str) -> None:
    await store.put(name, b"x")
    await store.delete(name)
    assert await store.size(name) is None
    assert await store.put(name, b"y", if_absent=True) is True


async def test_one_of_twelve_concurrent_writers_wins(store: ObjectStore, name: str) -> None:
    for attempt in range(3):
        target = f"{name}/{attempt}"
        results = await asyncio.gather(*(store.put(target, str(i).encode(), if_absent=True) for i in range(12)))
        assert results.count(True) == 1
        assert await store.get(target) == str(results.index(True)).encode()


async def test_list_gives_each_key_below_the_prefix_once(store: ObjectStore, name: str) -> None:
    wanted = {f"{name}/a", f"{name}/b-c", f"{name}/b/c", f"{name}/b/d/e"}
    await asyncio.gather(*(store.put(found, b"") for found in [*wanted, f"{name}2"]))
    found = [found async for found in store.list(name + "/")]
    assert sorted(found) == sorted(wanted)
    assert [found async for found in store.list(name + "/b-")] == [f"{name}/b-c"]
    assert [found async for found in store.list(name + "/nothing")] == []


async def test_list_goes_on_after_a_page(store: ObjectStore, name: str) -> None:
    wanted = {f"{name}/{i}" for i in range(1105)}
    await asyncio.gather(*(store.put(found, b"") for found in wanted))
    found = [found async for found in store.list(name + "/")]
    assert len(found) == len(wanted)
    assert set(found) == wanted


async def test_files_of_64_mib(store: ObjectStore, name: str, tmp_path: Path) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    block = os.urandom(1024 * 1024)
    with source.open("wb") as file:
        for i in range(64):
            file.write(i.to_bytes(4, "big") + block[4:])
        file.write(b"tail")
    await store.put_file(name, source)
    assert await store.size(name) == 64 * 1024 * 1024 + 4
    await store.get_file(name, back)
    assert _digest(source) == _digest(back)


# --- blobs ------------------------------------------------------------------------------------------------------


async def test_blobs_are_named_by_their_digest(store: ObjectStore, tmp_path: Path) -> None:
    blobs, data = Blobs(store), os.urandom(100)
    (tmp_path / "f").write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    assert not await blobs.has(sha256)
    assert await blobs.put(data) == sha256
    assert await blobs.put_file(tmp_path / "f") == (sha256, 100)
    assert await blobs.has(sha256)
    assert await blobs.get(sha256) == data
    await blobs.get_file(sha256, tmp_path / "new" / "g")
    assert (tmp_path / "new" / "g").read_bytes() == data


async def test_a_blob_that_is_there_is_not_sent_again(store: ObjectStore, tmp_path: Path) -> None:
    data = os.urandom(SMALL_BYTES + 1)
    (tmp_path / "f").write_bytes(data)
    sha256 = await Blobs(store).put(data)
    refusing = Blobs(Faulty(store, fail_at=1))
    assert await refusing.put(data) == sha256
    assert await refusing.put_file(tmp_path / "f") == (sha256, len(data))


async def test_a_tampered_blob_is_never_handed_out(store: ObjectStore, tmp_path: Path) -> None:
    blobs, data = Blobs(store), os.urandom(100)
    sha256 = await blobs.put(data)
    await store.put(key(sha256), data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(errors.DigestMismatch, match=sha256):
        await blobs.get(sha256)
    with pytest.raises(errors.DigestMismatch):
        await blobs.get_file(sha256, tmp_path / "g")
    assert os.listdir(tmp_path) == []


async def test_a_truncated_blob_is_mended_by_the_next_put(store: ObjectStore) -> None:
    blobs, data = Blobs(store), os.urandom(100)
    sha256 = await blobs.put(data)
    await store.put(key(sha256), data[:50])
    await blobs.put(data)
    assert await blobs.get(sha256) == data


@pytest.mark.parametrize("sha256", ["", "ab", "g" * 64, "A" * 64, "../" + "a" * 61, "a" * 64 + "\n"])
async def test_a_blob_key_is_a_digest(sha256: str) -> None:
    with pytest.raises(errors.InvalidArgument) as raised:
        await Blobs(MemoryStore()).get(sha256)
    assert raised.value.field == "sha256"


# --- artifacts --------------------------------------------------------------------------------------------------


async def test_commit_and_fetch(store: ObjectStore, name: str, tmp_path: Path) -> None:
    artifacts = Artifacts(store, tmp_path / "cache")
    (tmp_path / "f").write_bytes(b"from a file " + name.encode())
    manifest = SnapshotManifest(name=name, digest="d", file_count=2)
    stored = await artifacts.commit(name, manifest, {"z/b.bin": tmp_path / "f", "a.txt": b"bytes"})
    assert [file.path for file in stored] == ["a.txt", "z/b.bin"]
    assert stored[0] == ArtifactFile(path="a.txt", sha256=hashlib.sha256(b"bytes").hexdigest(), size=5)

    read = await artifacts.manifest(name, SnapshotManifest)
    assert read == manifest
    assert list(read.files) == stored
    folder = await artifacts.fetch(name, read.files)
    assert (folder / "a.txt").read_bytes() == b"bytes"
    assert (folder / "z/b.bin").read_bytes() == b"from a file " + name.encode()


async def test_no_artifact(store: ObjectStore, name: str, tmp_path: Path) -> None:
    with pytest.raises(errors.ArtifactNotFound, match=name):
        await Artifacts(store, tmp_path).manifest(name, SnapshotManifest)


async def test_recommit_of_the_same_content_changes_nothing(store: ObjectStore, name: str, tmp_path: Path) -> None:
    artifacts = Artifacts(store, tmp_path)
    first = await artifacts.commit(name, SnapshotManifest(name=name), {"a": b"1"})
    assert await artifacts.commit(name, SnapshotManifest(name=name), {"a": b"1"}) == first


@pytest.mark.parametrize("files", [{"a": b"2"}, {"b": b"1"}, {"a": b"1", "b": b""}])
async def test_other_content_needs_another_name(
    store: ObjectStore, name: str, tmp_path: Path, files: dict[str, Path | bytes]
) -> None:
    artifacts = Artifacts(store, tmp_path)
    await artifacts.commit(name, SnapshotManifest(name=name), {"a": b"1"})
    with pytest.raises(errors.ResourceExists):
        await artifacts.commit(name, SnapshotManifest(name=name), files)
    folder = await artifacts.fetch(name, (await artifacts.manifest(name, SnapshotManifest)).files)
    assert (folder / "a").read_bytes() == b"1"


async def test_concurrent_commits_of_different_content_have_one_winner(
    store: ObjectStore, name: str, tmp_path: Path
) -> None:
    artifacts = Artifacts(store, tmp_path)
    results = await asyncio.gather(
        *(artifacts.commit(name, SnapshotManifest(name=name), {"a": str(i).encode()}) for i in range(6)),
        return_exceptions=True,
    )
    assert sum(isinstance(result, list) for result in results) == 1
    assert sum(isinstance(result, errors.ResourceExists) for result in results) == 5


@pytest.mark.parametrize("fail_at", [1, 2, 3])
async def test_nothing_is_visible_when_a_commit_fails_in_the_middle(
    store: ObjectStore, name: str, tmp_path: Path, fail_at: int
) -> None:
    files: dict[str, Path | bytes] = {"a": os.urandom(20), "b": os.urandom(20)}
    broken = Artifacts(Faulty(store, fail_at), tmp_path)  # two blobs, then the manifest
    with pytest.raises(errors.StoreUnavailable, match="injected"):
        await broken.commit(name, SnapshotManifest(name=name), files)
    whole = Artifacts(store, tmp_path)
    with pytest.raises(errors.ArtifactNotFound):
        await whole.manifest(name, SnapshotManifest)

    await whole.commit(name, SnapshotManifest(name=name), files)
    folder = await whole.fetch(name, (await whole.manifest(name, SnapshotManifest)).files)
    assert (folder / "b").read_bytes() == files["b"]


async def test_a_commit_whose_answer_was_lost_can_be_repeated(store: ObjectStore, name: str, tmp_path: Path) -> None:
    lossy = Artifacts(Faulty(store, fail_at=2, after=True), tmp_path)
    with pytest.raises(errors.StoreUnavailable):
        await lossy.commit(name, SnapshotManifest(name=name), {"a": name.encode()})
    stored = await lossy.commit(name, SnapshotManifest(name=name), {"a": name.encode()})
    assert list((await lossy.manifest(name, SnapshotManifest)).files) == stored


async def test_the_cache_is_used_verified_and_mended(store: ObjectStore, name: str, tmp_path: Path) -> None:
    artifacts = Artifacts(store, tmp_path)
    content = name.encode()
    files = await artifacts.commit(name, SnapshotManifest(name=name), {"a": content, "b": b"b"})
    folder = await artifacts.fetch(name, files)
    await store.delete(key(files[0].sha256))
    assert await artifacts.fetch(name, files) == folder, "cached files need no store"

    (folder / "a").write_bytes(content[:-1] + b"!")
    with pytest.raises(errors.ObjectNotFound):  # it was found damaged, and fetched again
        await artifacts.fetch(name, files)
    await Blobs(store).put(content)
    assert (await artifacts.fetch(name, files) / "a").read_bytes() == content


async def test_only_what_is_asked_for_is_fetched(store: ObjectStore, name: str, tmp_path: Path) -> None:
    artifacts = Artifacts(store, tmp_path)
    files = await artifacts.commit(name, DatasetManifest(name=name), {"a": b"1", "d/b": b"2"})
    folder = await artifacts.fetch(name, files, only=["d/b"])
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()] == ["d/b"]
    assert await artifacts.fetch(name, files) == folder
    with pytest.raises(errors.InvalidArgument, match="'c'"):
        await artifacts.fetch(name, files, only=["c"])


async def test_concurrent_fetches_share_a_cache(store: ObjectStore, name: str, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    files = await Artifacts(store, tmp_path).commit(name, SnapshotManifest(name=name), {"a": content})
    folders = await asyncio.gather(*(Artifacts(store, tmp_path).fetch(name, files) for _ in range(8)))
    assert len(set(folders)) == 1
    assert (folders[0] / "a").read_bytes() == content
    assert [path.name for path in folders[0].iterdir()] == ["a"], "no temporary files stay"


@pytest.mark.parametrize(
    "paths", [["/etc/x"], ["../x"], ["a/../b"], ["a//b"], ["./a"], [""], ["a\\b"], ["a\0"], ["a", "a/b"], ["a/"]]
)
async def test_paths_stay_inside_the_artifact(tmp_path: Path, paths: list[str]) -> None:
    artifacts = Artifacts(MemoryStore(), tmp_path)
    with pytest.raises(errors.InvalidArgument):
        await artifacts.commit("n", SnapshotManifest(), {path: b"" for path in paths})
    sha256 = hashlib.sha256(b"").hexdigest()
    with pytest.raises(errors.InvalidArgument):
        await artifacts.fetch("n", [ArtifactFile(path=path, sha256=sha256) for path in paths])
    assert os.listdir(tmp_path) == []


async def test_a_damaged_manifest_is_told(tmp_path: Path) -> None:
    store = MemoryStore()
    await store.put("n/manifest.json", b'{"files": [')
    with pytest.raises(errors.DigestMismatch, match="'n'"):
        await Artifacts(store, tmp_path).manifest("n", SnapshotManifest)


# --- the real store's own failures ----------------------------------------------------------------------------------


async def test_wrong_credentials_are_named_and_never_repeated(s3_server: S3Address) -> None:
    wrong = S3Address(s3_server.endpoint, s3_server.bucket, s3_server.access_key, "not-the-secret")
    store = S3Store(wrong)
    for call in (store.prepare(), store.get("x"), store.put("x", b"")):
        with pytest.raises(errors.StoreUnavailable, match="credentials") as raised:
            await call
        assert "not-the-secret" not in str(raised.value)
    with pytest.raises(errors.StoreUnavailable) as raised:
        await store.put("x", b"", if_absent=True)
    assert "Signature=" not in str(raised.value)
    store.close()


async def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    store = S3Store(S3Address(f"127.0.0.1:{ports.choose(['s3'], {})['s3']}", "bucket", "a", "s"))
    for call in (store.get("k"), store.put("k", b""), store.put("k", b"", if_absent=True), store.size("k")):
        with pytest.raises(errors.StoreUnavailable, match="refused") as raised:
            await call
        assert raised.value.__cause__ is None
    with pytest.raises(errors.InvalidArgument, match="bucket name"):
        await S3Store(S3Address("127.0.0.1:1", "B", "a", "s")).get("k")
    store.close()


async def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    store = S3Store(S3Address(f"127.0.0.1:{port}", "bucket", "a", "s"), read_timeout=timedelta(milliseconds=100))
    async with asyncio.timeout(20):
        with pytest.raises(errors.StoreUnavailable, match="timed out"):
            await store.get("k")
    store.close()

    async def within_a_call() -> None:
        monkeypatch.setattr(context, "MARGIN", 9.5)  # on a busy machine the usual one is over before we look
        context.set_deadline(10.0)
        patient = S3Store(S3Address(f"127.0.0.1:{port}", "bucket", "a", "s"), read_timeout=timedelta(seconds=30))
        began = time.monotonic()
        with pytest.raises(errors.StoreUnavailable, match="within the time of the call"):
            await patient.get("k")
        assert time.monotonic() - began < 10.0, "its caller still listens"
        patient.close()

    await asyncio.create_task(within_a_call())  # a task, for its deadline is no other test's
    server.close()


async def test_a_server_that_fails_says_why() -> None:
    body = b"<Error><Code>InternalError</Code><Message>no space left</Message></Error>"

    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline() not in (b"\r\n", b""):
            pass
        writer.write(b"HTTP/1.1 500 Failed\r\nContent-Type: application/xml\r\nConnection: close\r\n")
        writer.write(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(fail, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    store = S3Store(S3Address(f"127.0.0.1:{port}", "bucket", "a", "s"), retries=1)
    for call in (store.get("k"), store.put("k", b"x"), store.put("k", b"x", if_absent=True)):
        with pytest.raises(errors.StoreUnavailable, match="no space left") as raised:
            await call
        assert "disk" in raised.value.hint
    store.close()
    server.close()


async def test_a_server_that_does_not_speak_s3() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    store = S3Store(S3Address(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", "bucket", "a", "s"))
    with pytest.raises(errors.StoreUnavailable, match="does not speak S3"):
        await store.prepare()
    store.close()
    server.close()


async def test_a_server_that_ignores_conditions_is_refused() -> None:
    """As old S3 servers do: they overwrite, and say that all is well."""
    objects: dict[str, bytes] = {}

    class Careless(S3Store):
        async def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
            objects[key] = data
            return True

        async def size(self, key: str) -> int | None:
            return len(objects[key]) if key in objects else None

        async def delete(self, key: str) -> None:
            objects.pop(key, None)

        def _make_bucket(self) -> None: ...

    store = Careless(S3Address("127.0.0.1:1", "bucket", "a", "s"))
    for _ in range(2):  # a second look is not taken in by what the first one left
        with pytest.raises(errors.StoreUnavailable, match="ignores If-None-Match"):
            await store.prepare()
    store.close()


async def test_a_bucket_that_is_not_there_is_made(s3_server: S3Address) -> None:
    other = S3Store(S3Address(s3_server.endpoint, new_id("b"), s3_server.access_key, s3_server.secret_key))
    with pytest.raises(errors.StoreUnavailable, match="bucket"):
        await other.put("k", b"")
    await asyncio.gather(other.prepare(), other.prepare())
    await other.put("k", b"v")
    assert await other.get("k") == b"v"
    other.close()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
