"""Blobs: bytes under the key of their own SHA-256, verified whenever they are read."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

from services.core.errors import DigestMismatch, InvalidArgument
from services.core.store.store import ObjectStore

PREFIX = "blobs/sha256/"
REWRITE_AFTER = timedelta(minutes=30)
"""Age from which a blob is stored anew instead of relied on: garbage collection takes what is old and referred to by
nothing, and nothing refers to this one yet. Well below the least age that it takes."""
SMALL_BYTES = 256 << 10
"""To ask whether so little is there takes as long as to store it again."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Blobs:
    """Content-addressed objects: the same bytes are stored once, and can never be other bytes."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    async def put(self, data: bytes) -> str:
        """Stores the bytes unless they are there, and returns their SHA-256 in hexadecimal."""
        sha256 = (await asyncio.to_thread(hashlib.sha256, data)).hexdigest()
        if len(data) <= SMALL_BYTES or not await self._is_fresh(sha256, len(data)):
            await self._store.put(key(sha256), data)
        return sha256

    async def put_file(self, path: Path) -> tuple[str, int]:
        """Stores a file's bytes unless they are there; returns their SHA-256 and their size in bytes.

        The file must not change meanwhile: a reader would be told of a digest mismatch.
        """
        sha256, size = await asyncio.to_thread(lambda: (digest_of(path), path.stat().st_size))
        if not await self._is_fresh(sha256, size):
            await self._store.put_file(key(sha256), path)
        return sha256, size

    async def put_stream(self, sha256: str, stream: BinaryIO, size: int) -> None:
        """Stores what a stream gives; its owner answers for the digest, and raises instead of giving other bytes."""
        if await self._is_fresh(sha256, size):
            return
        await self._store.put_stream(key(sha256), stream, size)

    async def get(self, sha256: str) -> bytes:
        """The bytes.

        Raises:
            ObjectNotFound: there is no such blob.
            DigestMismatch: what is stored has another digest.
        """
        data = await self._store.get(key(sha256))
        _check(sha256, (await asyncio.to_thread(hashlib.sha256, data)).hexdigest())
        return data

    async def get_file(self, sha256: str, to: Path) -> None:
        """Writes the bytes to a file, which appears at once and only when they are the right ones.

        Raises:
            ObjectNotFound: there is no such blob.
            DigestMismatch: what is stored has another digest.
        """
        with _replacing(to) as temporary:
            await self._store.get_file(key(sha256), temporary)
            _check(sha256, await asyncio.to_thread(digest_of, temporary))

    async def _is_fresh(self, sha256: str, size: int) -> bool:
        """Whether the blob is there and too young for garbage collection."""
        found = await self._store.stat(key(sha256))
        return found is not None and found.size == size and datetime.now(UTC) - found.modified < REWRITE_AFTER

    async def has(self, sha256: str) -> bool:
        """Whether the blob is stored."""
        return await self._store.size(key(sha256)) is not None


def key(sha256: str) -> str:
    """The object key of a blob.

    Raises:
        InvalidArgument: that is no SHA-256 in lower-case hexadecimal.
    """
    if not _SHA256.fullmatch(sha256):
        raise InvalidArgument(
            f"{sha256[:80]!r} is no SHA-256", field="sha256", hint="Give 64 lower-case hexadecimal digits."
        )
    return f"{PREFIX}{sha256[:2]}/{sha256[2:]}"


def digest_in(key: str) -> str:
    """The SHA-256 in the key of a blob."""
    return key.removeprefix(PREFIX).replace("/", "")


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Blocks; for a thread."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(wanted: str, found: str) -> None:
    if wanted != found:
        raise DigestMismatch(
            f"the stored blob {wanted} has the digest {found}",
            field="sha256",
            hint="The object store returned damaged data: restore that object, or repeat what produced it.",
            sha256=wanted,
        )


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place at the end, and goes when that is not reached."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:64]}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
