"""An adapter on its way to a browser: one tar file of what the trainer sends, verified before any byte goes out."""

from __future__ import annotations

import asyncio
import tarfile
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.responses import Response, StreamingResponse

from services.client.aio.adapters import Adapters
from services.core.rpc import context

_PIECE = 1 << 20
_BLOCK = 512
"""Files in a tar begin at multiples of it."""


async def as_tar(adapters: Adapters, checkpoint: str) -> Response:
    """The response.

    Raises:
        CodegraftError: as :meth:`services.client.aio.adapters.Adapters.download` does.
    """
    context.set_deadline(None)
    folder = tempfile.TemporaryDirectory(prefix="codegraft-adapter-")
    try:
        await adapters.download(checkpoint, Path(folder.name) / "adapter")
    except BaseException:
        folder.cleanup()
        raise
    files = sorted((Path(folder.name) / "adapter").iterdir())
    parts = checkpoint.split("/")
    headers = {
        "content-disposition": f'attachment; filename="{parts[1]}-{parts[3]}-{parts[5]}.tar"',
        "content-length": str(sum(_BLOCK + _padded(file.stat().st_size) for file in files) + 2 * _BLOCK),
    }
    return StreamingResponse(_tar(files, folder), headers=headers, media_type="application/x-tar")


async def _tar(files: list[Path], folder: tempfile.TemporaryDirectory[str]) -> AsyncIterator[bytes]:
    try:
        for path in files:
            info = tarfile.TarInfo(path.name)
            info.size = path.stat().st_size
            yield info.tobuf(tarfile.USTAR_FORMAT)
            with path.open("rb") as file:
                while data := await asyncio.to_thread(file.read, _PIECE):
                    yield data
            yield bytes(_padded(info.size) - info.size)
        yield bytes(2 * _BLOCK)
    finally:
        folder.cleanup()  # also where the browser went away


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
