"""A stream of requests that opens with a header and goes on with chunks of bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol, TypeVar

from services.core.errors import InvalidArgument

H = TypeVar("H")
H_co = TypeVar("H_co", covariant=True)


class Chunk(Protocol):
    """Bytes and their position."""

    @property
    def offset(self) -> int: ...
    @property
    def data(self) -> bytes: ...


class Part(Protocol[H_co]):
    """A message with the oneof ``part``: a header or a chunk."""

    @property
    def header(self) -> H_co: ...
    @property
    def chunk(self) -> Chunk: ...
    def WhichOneof(self, oneof_group: str) -> str | None: ...


async def opened(messages: AsyncIterator[Part[H]]) -> tuple[H, AsyncIterator[tuple[int, bytes]]]:
    """The header, and what follows it: (position in the bytes of all files, bytes).

    Raises:
        InvalidArgument: the first message is no header; or, from the iterator, a later one is.
    """
    first = await anext(aiter(messages), None)
    if first is None or first.WhichOneof("part") != "header":
        raise InvalidArgument(
            "the first message is no header", field="header", hint="Send the header, then the chunks."
        )
    return first.header, _chunks(messages)


async def _chunks(messages: AsyncIterator[Part[H]]) -> AsyncIterator[tuple[int, bytes]]:
    async for message in messages:
        if message.WhichOneof("part") != "chunk":
            raise InvalidArgument("only the first message is a header", field="chunk", hint="Send chunks after it.")
        yield message.chunk.offset, message.chunk.data
