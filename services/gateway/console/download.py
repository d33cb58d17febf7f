"""An adapter on its way to a browser: one tar file, made of what the trainer sends while it comes. Nothing is kept."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import AsyncIterator

from starlette.responses import Response, StreamingResponse

from codegraft.trainer.v1 import adapter_pb2 as pb
from services.client.aio.adapters import Adapters
from services.client.streams import AsyncStream
from services.core.errors import DigestMismatch
from services.core.rpc import context

FORMATS = {
    "peft": pb.ADAPTER_FORMAT_PEFT,
    "merged": pb.ADAPTER_FORMAT_MERGED,
    "gguf": pb.ADAPTER_FORMAT_GGUF,
}
_BLOCK = 512
"""Files in a tar begin at multiples of it; two empty ones end it."""


async def as_tar(adapters: Adapters, checkpoint: str, format: pb.AdapterFormat) -> Response:
    """The response; it begins once the trainer has converted the model.

    Raises:
        CodegraftError: as :meth:`services.client.aio.adapters.Adapters.download` does.
    """
    context.set_deadline(None)
    stream = adapters.stream(checkpoint, format=format)
    async for message in stream:
        if message.HasField("header"):
            break
    else:
        raise DigestMismatch("the download ended before it said what it is", hint="Download it again.")
    files = message.header.files
    parts = checkpoint.split("/")
    headers = {
        "content-disposition": f'attachment; filename="{parts[1]}-{parts[3]}-{parts[5]}.tar"',
        "content-length": str(sum(_BLOCK + file.size + _padding(file.size) for file in files) + 2 * _BLOCK),
    }
    return StreamingResponse(_tar(message.header, stream), headers=headers, media_type="application/x-tar")


async def _tar(header: pb.DownloadHeader, stream: AsyncStream[pb.DownloadCheckpointResponse]) -> AsyncIterator[bytes]:
    """The tar; its end is sent only when all digests are right, so that a browser takes nothing else for whole.

    Raises:
        DigestMismatch: what arrived is not what was announced.
    """
    try:
        for file in header.files:
            info = tarfile.TarInfo(file.path)
            info.size = file.size
            yield info.tobuf(tarfile.GNU_FORMAT)
            digest, left = hashlib.sha256(), file.size
            while left:
                message = await anext(stream, None)
                data = message.chunk.data if message is not None else b""
                if not 0 < len(data) <= left:  # ended, or over the file's end
                    raise DigestMismatch(f"{file.path} does not have the {file.size} bytes that were announced")
                digest.update(data)
                left -= len(data)
                yield data
            if digest.hexdigest() != file.sha256:
                raise DigestMismatch(f"{file.path} is not what was announced", hint="Download it again.")
            yield bytes(_padding(file.size))
        yield bytes(2 * _BLOCK)
    finally:
        stream.cancel()


def _padding(size: int) -> int:
    return -size % _BLOCK
