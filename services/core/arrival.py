"""Files that arrive one behind the other in a stream of chunks, each to be as long and as digested as announced."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from codegraft.common.v1.artifact_pb2 import ArtifactFile
from services.core import disk
from services.core.errors import InvalidArgument, UploadMismatch

MAX_CHUNK = 1 << 20
"""Bytes of the largest chunk that is taken."""


async def receive(files: Sequence[ArtifactFile], chunks: AsyncIterator[tuple[int, bytes]], folder: Path) -> None:
    """Writes the files into a folder, and returns when all are there as announced.

    Args:
        files: as announced, in the order of their bytes. Their paths must have been checked by the caller.
        chunks: (position in the bytes of all files, bytes).

    Raises:
        InvalidArgument: a chunk is too large.
        UploadMismatch: a chunk does not continue what arrived, too few or too many bytes, or another digest.
    """
    rest = _Rest(chunks)
    for announced in files:
        digest, missing = hashlib.sha256(), announced.size
        path = folder / announced.path
        with disk.writing(folder), path.open("wb") as file:
            while missing:
                data = await rest.take(missing)
                if not data:
                    raise UploadMismatch(
                        f"{announced.path} ends {missing} bytes early", field="chunk", hint="Send the whole file again."
                    )
                missing -= len(data)
                await asyncio.to_thread(file.write, data)
                digest.update(data)
        if digest.hexdigest() != announced.sha256:
            raise UploadMismatch(
                f"{announced.path} has the SHA-256 {digest.hexdigest()}, not {announced.sha256[:80]}",
                field="header.files",
                hint="Send the file again; it changed while it was sent, or on its way.",
            )
    if await rest.take(1):
        raise UploadMismatch("more bytes arrive than were announced", field="header.files", hint="Correct the sizes.")


class _Rest:
    """What has arrived and belongs to no file yet."""

    def __init__(self, chunks: AsyncIterator[tuple[int, bytes]]) -> None:
        self._chunks = chunks
        self._arrived = 0
        self._data = b""

    async def take(self, most: int) -> bytes:
        """The next bytes, at least one of them; empty at the end."""
        while not self._data:
            try:
                offset, self._data = await anext(self._chunks)
            except StopAsyncIteration:
                return b""
            if offset != self._arrived:
                raise UploadMismatch(
                    f"a chunk begins at {offset}, but {self._arrived} bytes have arrived",
                    field="chunk.offset",
                    hint="Send the chunks in order, from the start.",
                )
            if len(self._data) > MAX_CHUNK:
                raise InvalidArgument("a chunk is larger than 1 MiB", field="chunk.data", hint="Send smaller chunks.")
            self._arrived += len(self._data)
        taken, self._data = self._data[:most], self._data[most:]
        return taken
