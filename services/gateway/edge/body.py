"""Bodies of requests: bounded in size and time, JSON, and of the type that the operation wants."""

from __future__ import annotations

import asyncio
from typing import TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from services.core.errors import InvalidArgument
from services.gateway.edge.attending import ClientGone
from services.gateway.edge.problems import Refused

_PATIENCE = 8
"""So many times the largest body are read of one that is larger."""

Ask = TypeVar("Ask", bound=BaseModel)


async def parse(request: Request, ask: type[Ask], *, most: int, seconds: float) -> Ask:
    """The request's body.

    Args:
        most: bytes.
        seconds: for it to arrive.

    Raises:
        Refused: it is too large, too slow, or not announced as JSON. That it must be announced keeps web pages out,
            which may send other types to anybody without asking first.
        InvalidArgument: it is not JSON, or not of that type; names the first field at fault.
        ClientGone: the client went away.
    """
    data = await read(request, "application/json", most=most, seconds=seconds)
    try:
        return ask.model_validate(orjson.loads(data))
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"the body is not JSON: {error}", hint="Send a JSON object in UTF-8.") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        path = ".".join(
            str(part) for part in first["loc"] if not str(part).startswith(("list[", "function-", "constrained-"))
        )
        name = path.partition(".")[0]
        raise InvalidArgument(
            f"{path or 'the body'}: {first['msg'].removeprefix('Value error, ')}",
            field=name,
            hint="See /openapi.json.",
        ) from None


async def read(request: Request, kind: str, *, most: int, seconds: float) -> bytes:
    """The request's body as it is.

    Args:
        kind: the media type that it must be announced as.
        most: bytes.
        seconds: for it to arrive.

    Raises:
        Refused: it is too large, too slow, compressed, or of another type.
        ClientGone: the client went away.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != kind:
        raise Refused(415, "UNSUPPORTED_MEDIA_TYPE", f"Send the body as {kind}.")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Refused(415, "UNSUPPORTED_MEDIA_TYPE", "Send the body as it is, without a Content-Encoding.")
    try:
        async with asyncio.timeout(seconds):
            return await _read(request, most)
    except TimeoutError:
        raise Refused(408, "BODY_TIMEOUT", f"The body did not arrive within {seconds:g} s.") from None
    except ClientDisconnect:
        raise ClientGone from None


async def _read(request: Request, most: int) -> bytes:
    """What is too large is read on and thrown away for a while: a client that still sends when the connection is closed
    sees that, and not why."""
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > _PATIENCE * most:
        raise _too_large(most)
    data, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        if size <= most:
            data += part
        elif size > _PATIENCE * most:
            break
    if size > most:
        raise _too_large(most)
    return bytes(data)


def _too_large(most: int) -> Refused:
    return Refused(413, "LIMIT_EXCEEDED", f"The body is larger than {most} bytes. Send less of the file.")
