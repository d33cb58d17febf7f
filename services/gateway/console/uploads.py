"""Files on their way from a browser into a project, over the resumable upload of ingest.

The browser knows a file's SHA-256, asks how much of it is there, and sends the rest as one body. Where that breaks off,
it asks again: nothing is kept here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from codegraft.ingest.v1.upload_pb2 import Upload
from services.core.errors import InvalidArgument, UploadMismatch
from services.core.rpc import context
from services.gateway.api import desk
from services.gateway.console.visit import House, Visit
from services.gateway.edge.attending import ClientGone

_CHUNK = 1 << 20
"""Most bytes in a message of ingest's."""
_SILENCE = 60.0
"""Seconds without a byte after which a browser counts as gone."""
_TYPE = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Arrived:
    """Answer to both requests."""

    name: str
    """Of the upload, for the source that is made of it."""
    offset: int
    """Bytes that are there."""
    complete: bool


def routes(house: House) -> list[Route]:
    """Both of them."""
    path = "/p/{project}/uploads/{sha256}"
    return [house.route(path, state), house.route(path, receive, method="PUT")]


async def state(visit: Visit) -> Response:
    """GET /console/p/acme/uploads/{sha256}"""
    return _answer(await visit.client.sources.arrived(visit.project, visit.request.path_params["sha256"]))


async def receive(visit: Visit) -> Response:
    """PUT /console/p/acme/uploads/{sha256}?offset=&size=&filename=: the bytes from the offset on."""
    context.set_deadline(None)  # as long as bytes come: see _SILENCE
    query, request = visit.query, visit.request
    if request.headers.get("content-type", "") != _TYPE:  # nothing that a form of another site can send
        raise InvalidArgument(f"a file is sent as {_TYPE}", field="content-type")
    size, offset = query.whole("size"), query.whole("offset")
    if size is None or offset is None or min(size, offset) < 0:
        raise InvalidArgument("size and offset of the file are missing", field="size", hint="Give both, in bytes.")
    announced = Upload(sha256=request.path_params["sha256"], size=size, filename=query.text("filename")[:255])
    body = _Body(request)
    try:
        return _answer(await visit.client.sources.send(visit.project, announced, offset, body.parts()))
    except UploadMismatch as error:
        if body.is_broken:
            raise ClientGone from error
        raise
    finally:
        body.close()


def _answer(upload: Upload) -> Response:
    return desk.answer(Arrived(upload.name, upload.offset, upload.complete))


class _Body:
    """A request's body, for the thread in which the client sends."""

    def __init__(self, request: Request) -> None:
        self._loop = asyncio.get_running_loop()
        self._chunks = self._read(request)
        self._ended = asyncio.Event()
        self.is_broken = False
        """Whether the browser went away in the middle."""

    def parts(self) -> Iterator[bytes]:
        """Its pieces, each asked for when the one before was sent: a slow service slows the browser down."""
        while True:
            try:
                data = asyncio.run_coroutine_threadsafe(self._next(), self._loop).result()
            except RuntimeError:  # the loop is closed: nobody waits any more
                return
            if not data:
                return
            yield data

    def close(self) -> None:
        """Lets a thread go that still waits for bytes."""
        self._ended.set()

    async def _next(self) -> bytes:
        """Empty at the end, however it comes: an exception would end the call as if its caller had cancelled it, and
        ingest would not learn that it is to keep what arrived."""
        reading, ended = asyncio.ensure_future(anext(self._chunks, b"")), asyncio.ensure_future(self._ended.wait())
        await asyncio.wait((reading, ended), timeout=_SILENCE, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not reading.done():
            reading.cancel()
            self.is_broken = True
            return b""
        try:
            return reading.result()
        except ClientDisconnect:
            self.is_broken = True
            return b""

    @staticmethod
    async def _read(request: Request) -> AsyncGenerator[bytes, None]:
        """Pieces of at most :data:`_CHUNK`."""
        waiting = bytearray()
        async for data in request.stream():
            waiting += data
            while len(waiting) >= _CHUNK:
                yield bytes(waiting[:_CHUNK])
                del waiting[:_CHUNK]
        if waiting:
            yield bytes(waiting)
