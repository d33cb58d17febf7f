"""Host memory and disk: limits in bytes, the latest used stay, and nothing is believed that was not verified."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from pathlib import Path

import pytest
import torch

from services.core import errors
from services.core.store import Blobs, MemoryStore
from services.inference.adapters.disk import DiskCache
from services.inference.adapters.host import HostCache, Verified


def verified(sha256: str, size: int = 10) -> Verified:
    return Verified(sha256, "c", {"layer": (torch.zeros(1, 1), torch.zeros(1, 1))}, 1.0, None, size)


def test_host_memory_holds_the_latest_used_ones() -> None:
    host = HostCache(limit=30)
    for sha256 in "abc":
        host.put(verified(sha256))
    assert host.get("a") and host.size == 30
    host.put(verified("d"))
    assert [bool(host.get(sha256)) for sha256 in "abcd"] == [True, False, True, True]
    host.put(verified("e", 25))
    assert [bool(host.get(sha256)) for sha256 in "acde"] == [False, False, False, True] and host.size == 25
    host.put(verified("f", 31))
    assert host.get("f") is None and host.get("e"), "what is too large puts nothing out"
    host.put(verified("e", 25))
    assert host.size == 25


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class CountingBlobs(Blobs):
    """Blobs that count what is asked of them."""

    asked = 0

    async def get(self, sha256: str) -> bytes:
        self.asked += 1
        return await super().get(sha256)


async def written(disk: DiskCache, sha256: str) -> bytes:
    """What it gives, once it has written that down."""
    data = await disk.read(sha256)
    await disk.written()
    return data


@pytest.fixture
def blobs() -> CountingBlobs:
    return CountingBlobs(MemoryStore())


async def test_the_store_is_asked_once(blobs: CountingBlobs, tmp_path: Path) -> None:
    disk = DiskCache(tmp_path / "adapters", blobs, 1000, later=0)
    sha256 = await blobs.put(b"weights")
    assert [await written(disk, sha256) for _ in range(3)] == [b"weights"] * 3 and blobs.asked == 1
    again = DiskCache(tmp_path / "adapters", blobs, 1000, later=0)
    assert await again.read(sha256) == b"weights" and blobs.asked == 1, "another replica, or the next start"


async def test_a_damaged_file_is_fetched_again(blobs: CountingBlobs, tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, blobs, 1000, later=0)
    sha256 = await blobs.put(b"weights")
    await written(disk, sha256)
    for damage in (b"weightz", b"", b"weights+"):
        (tmp_path / sha256).write_bytes(damage)
        assert await written(disk, sha256) == b"weights" == (tmp_path / sha256).read_bytes()
    assert blobs.asked == 4


async def test_what_is_no_digest_names_no_file(blobs: CountingBlobs, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    disk = DiskCache(tmp_path / "adapters", blobs, 1000, later=0)
    for name in ("../secret", "", "x", "/etc/passwd"):
        with pytest.raises(errors.InvalidArgument):
            await disk.read(name)
    with pytest.raises(errors.ObjectNotFound):
        await disk.read(hashlib.sha256(b"nowhere").hexdigest())


async def test_the_longest_unused_files_go(blobs: CountingBlobs, tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, blobs, 250, later=0)
    digests = [await blobs.put(bytes([n]) * 100) for n in range(3)]
    for age, sha256 in zip((30, 20), digests, strict=False):
        await written(disk, sha256)
        os.utime(tmp_path / sha256, (time.time() - age,) * 2)
    (tmp_path / ".dead.1").write_bytes(b"x")
    os.utime(tmp_path / ".dead.1", (0, 0))
    (tmp_path / ".alive.1").write_bytes(b"x")
    await written(disk, digests[0])  # used again, so the other one is the longest unused
    await written(disk, digests[2])
    assert names(tmp_path) == {digests[0], digests[2], ".alive.1"}
    huge = await blobs.put(b"y" * 1000)
    assert await written(disk, huge) and names(tmp_path) == {huge, ".alive.1"}


async def test_two_replicas_share_a_folder(blobs: CountingBlobs, tmp_path: Path) -> None:
    """With room for three of eight files both evict what the other reads and writes."""
    contents = [bytes([n]) * 50_000 for n in range(8)]
    digests = [await blobs.put(content) for content in contents]
    replicas = [DiskCache(tmp_path, blobs, 150_000, later=0) for _ in range(2)]

    async def read(disk: DiskCache, shift: int) -> None:
        for n in range(120):
            index = (n * shift + n // 8) % 8
            assert await written(disk, digests[index]) == contents[index]

    await asyncio.gather(*(read(disk, shift) for disk in replicas for shift in (1, 3, 5)))
    assert len(names(tmp_path)) <= 3 and names(tmp_path) <= set(digests)


async def test_without_a_disk_serving_goes_on(blobs: CountingBlobs, tmp_path: Path) -> None:
    (tmp_path / "adapters").write_text("a file where the folder should be")
    disk = DiskCache(tmp_path / "adapters", blobs, 1000, later=0)
    sha256 = await blobs.put(b"weights")
    assert await written(disk, sha256) == b"weights" == await written(disk, sha256)


async def test_a_file_is_served_before_it_is_written(blobs: CountingBlobs, tmp_path: Path) -> None:
    disk = DiskCache(tmp_path / "adapters", blobs, 1000, later=1.0)
    sha256 = await blobs.put(b"weights")
    assert await disk.read(sha256) == b"weights"
    await asyncio.sleep(0.05)
    assert not (tmp_path / "adapters").exists(), "it waits until a swap has the cores no more"
    await disk.written()
    assert names(tmp_path / "adapters") == {sha256}
