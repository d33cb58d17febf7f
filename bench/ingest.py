"""Benchmarks of ingest: ``python -m bench.ingest [clone] [upload] [files] [bombs]``; all of them when none is named.

Ratios are taken against a named peer within one run, on the same machine and over the same loopback servers.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import zstandard
from minio import Minio

from bench.stage import Stage, git, real_files, repository, stage
from codegraft.ingest.v1 import source_pb2
from services.core.errors import CodegraftError
from services.core.store import blobs
from tests.servers import git_http

ROUNDS = 5
SYNCS = 5
"""Syncs of one changed file in each round."""


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def fetched(on: Stage, project: str, url: str) -> source_pb2.Source:
    added = on.client.sources.add(project, source_pb2.Source(git=source_pb2.GitSource(url=url)))
    return on.client.sources.wait(added.name)


@contextmanager
def served() -> Iterator[git_http.GitServer]:
    """A git server over an empty folder."""
    with tempfile.TemporaryDirectory(prefix="codegraft-bench-") as folder, git_http.serving(Path(folder)) as server:
        yield server


def clone() -> None:
    """First fetch and snapshot against `git clone --bare`, then one changed file; as asked, and with more files."""
    for count in (3_000, 10_000):
        _clone(count)


def _clone(count: int) -> None:
    with served() as server, stage(CODEGRAFT_INGEST_ALLOWED_URLS=f'["{server.url}"]') as on:
        repo = repository(server.root / "app", real_files(count), commits=30)
        url = server.url + "app/.git"
        plain, first, again = [], [], []
        for number in range(ROUNDS):
            bare = on.folder / f"bare-{number}"
            plain.append(timed(partial(subprocess.run, ["git", "clone", "-q", "--bare", url, str(bare)])))
            shutil.rmtree(bare)
            project = f"p{number}"
            on.client.projects.create(project)
            source = source_pb2.Source()

            def take(project: str = project, source: source_pb2.Source = source) -> None:
                source.CopyFrom(fetched(on, project, url))
                on.client.snapshots.create(project)

            def sync(source: source_pb2.Source = source) -> None:
                on.client.sources.sync(source.name)
                source.CopyFrom(on.client.sources.wait(source.name))

            first.append(timed(take))
            for revision in range(SYNCS):
                (repo / "changed.py").write_text(f"x = {number}{revision}\n" * 100)
                git(repo, "add", "-A")
                git(repo, "commit", "-qm", "one file")
                again.append(timed(sync))
                size = (repo / "changed.py").stat().st_size
                assert source.snapshot and source.stored_bytes == size, (source.stored_bytes, size)
        median = statistics.median
        print(f"clone: {count:,} files, {source.byte_count / 1e6:.0f} MB, {ROUNDS} rounds, medians")
        print(f"  git clone --bare          {median(plain):.2f} s")
        print(
            f"  source add + snapshot     {median(first):.2f} s   ratio {median(first) / median(plain):.2f} (asked: 2)"
        )
        share = median(again) / median(first)
        print(f"  sync + snapshot, 1 file   {median(again):.3f} s   {100 * share:.1f} % of the first (asked: 10 %)")
        print(
            f"  content stored by that sync: {size} bytes, the changed file's own; ingest peak {on.resident():.0f} MB"
        )


def upload() -> None:
    """1 GB: minio-py's put_object against an upload through ingest."""
    with stage() as on:
        size = 1_000_000_000
        content = on.folder / "content"
        minio = Minio(on.s3.endpoint, on.s3.access_key, on.s3.secret_key, secure=False)
        on.client.projects.create("p")
        peer, ours = [], []
        peak = 0.0
        for number in range(3):
            with content.open("wb") as file:
                for _ in range(size // 1_000_000):
                    file.write(random.randbytes(1_000_000))

            def put(number: int = number) -> None:
                with content.open("rb") as file:
                    minio.put_object(on.s3.bucket, f"peer-{number}", file, size)

            peer.append(timed(put))
            minio.remove_object(on.s3.bucket, f"peer-{number}")
            on.forget_peak()
            ours.append(timed(lambda: on.client.sources.upload("p", content)))
            peak = max(peak, on.resident())
            twice = timed(lambda: on.client.sources.upload("p", content))
            for item in minio.list_objects(on.s3.bucket, prefix=blobs.PREFIX, recursive=True):
                minio.remove_object(on.s3.bucket, item.object_name or "")
        ratio = statistics.median(peer) / statistics.median(ours)
        print("upload: 1 GB, 3 rounds, medians")
        print(f"  minio-py put_object       {size / 1e6 / statistics.median(peer):.0f} MB/s")
        print(
            f"  codegraft upload          {size / 1e6 / statistics.median(ours):.0f} MB/s   "
            f"{100 * ratio:.0f} % (asked: 60 %)"
        )
        print(f"  ingest peak {peak:.0f} MB (asked: 300 MB); the same content once more: {twice:.2f} s, its hash")


def files() -> None:
    """100,000 files: fetch and snapshot; the digest against another order and another process."""
    count = 100_000
    with served() as server, stage(CODEGRAFT_INGEST_ALLOWED_URLS=f'["{server.url}"]') as on:
        repo = server.root / "many"
        repo.mkdir(parents=True)
        git(repo, "init", "-q", "--bare")
        paths = [f"pkg{n % 500:03d}/mod{n:06d}.py" for n in range(count)]
        bodies = {path: f"def f_{n}(x):\n    return x * {n} + {n % 7}\n".encode() * 8 for n, path in enumerate(paths)}
        subprocess.run(["git", "-C", str(repo), "fast-import", "--quiet"], input=_import(bodies), check=True)
        on.client.projects.create("p")
        on.forget_peak()
        began = time.perf_counter()
        source = fetched(on, "p", server.url + "many")
        middle = time.perf_counter()
        taken = on.client.snapshots.create("p")
        end = time.perf_counter()
        peak = on.resident()
        assert taken.file_count == count
        print(f"files: {count:,} files, {source.byte_count / 1e6:.0f} MB")
        print(
            f"  fetch {middle - began:.1f} s, snapshot {end - middle:.1f} s (asked: under 60 s); "
            f"peak {peak:.0f} MB (asked: 1 GB)"
        )
        on.restart()
        again = on.client.snapshots.create("p")
        shuffled = list(bodies)
        random.shuffle(shuffled)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
            for path in shuffled:
                member = tarfile.TarInfo(path)
                member.size = len(bodies[path])
                tar.addfile(member, io.BytesIO(bodies[path]))
        other = on.client.sources.wait(on.client.sources.add_archive("p", packed.getvalue(), source_id="t").name)
        print(f"  digest after a restart: {'the same' if again.digest == taken.digest else 'DIFFERS'}")
        same = other.content_digest == source.content_digest
        print(f"  content digest of a shuffled tar of the same files: {'the same' if same else 'DIFFERS'}")


def _import(bodies: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    out.write(b"commit refs/heads/master\ncommitter b <b@example.com> 0 +0000\ndata 0\n")
    for path, data in bodies.items():
        out.write(f"M 100644 inline {path}\ndata {len(data)}\n".encode() + data + b"\n")
    return out.getvalue()


def _zeros(size: int) -> Iterator[bytes]:
    part = bytes(1 << 20)
    for _ in range(size >> 20):
        yield part


def bombs() -> None:
    """Bombs of every kind through the whole service: time, memory, what was written."""
    size = 8 << 30
    header = tarfile.TarInfo("zeros.py")
    header.size = size
    head = header.tobuf()

    def gz(path: Path) -> None:
        with gzip.open(path, "wb", compresslevel=9) as file:
            file.write(head)
            for part in _zeros(size >> 3):
                file.write(part)

    def bz(path: Path) -> None:
        with bz2.open(path, "wb") as file:
            file.write(head)
            for part in _zeros(size >> 4):
                file.write(part)

    def xz(path: Path) -> None:
        with lzma.open(path, "wb", preset=1) as file:
            file.write(head)
            for part in _zeros(size >> 3):
                file.write(part)

    def zst(path: Path) -> None:
        with path.open("wb") as raw, zstandard.ZstdCompressor(level=3).stream_writer(raw) as file:
            file.write(head)
            for part in _zeros(size):
                file.write(part)

    def many(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for number in range(512):
                archive.writestr(f"f{number}.py", bytes(15 << 20))

    def empty(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for number in range(65_000):
                archive.writestr(f"f{number}.py", b"")

    kinds = {"tar.gz": gz, "tar.bz2": bz, "tar.xz": xz, "tar.zst": zst, "zip": many, "65,000 empty": empty}
    with stage() as on:
        on.client.projects.create("p")
        minio = Minio(on.s3.endpoint, on.s3.access_key, on.s3.secret_key, secure=False)
        print("bombs, through the whole service (asked: under 2 s, 256 MB resident, 64 MiB written)")
        for kind, make in kinds.items():
            path = on.folder / "bomb"
            make(path)
            upload = on.client.sources.upload("p", path)
            before = sum(item.size or 0 for item in minio.list_objects(on.s3.bucket, recursive=True))
            on.forget_peak()
            began = time.perf_counter()
            added = on.client.sources.add("p", source_pb2.Source(archive=source_pb2.ArchiveSource(upload=upload.name)))
            try:
                outcome = f"read: {on.client.sources.wait(added.name).file_count} files"
            except CodegraftError as error:
                outcome = error.reason
            seconds = time.perf_counter() - began
            written = sum(item.size or 0 for item in minio.list_objects(on.s3.bucket, recursive=True)) - before
            print(
                f"  {kind:14} {path.stat().st_size / 1e6:7.2f} MB  {seconds:5.2f} s  peak {on.resident():4.0f} MB  "
                f"written {written / (1 << 20):5.1f} MiB  {outcome}"
            )


if __name__ == "__main__":
    known = {"clone": clone, "upload": upload, "files": files, "bombs": bombs}
    for name in sys.argv[1:] or known:
        known[name]()
